"""Programs nobody wrote: decoders with cache branches, faults put into them, and their judge."""
