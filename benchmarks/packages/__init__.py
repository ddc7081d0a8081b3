"""Decoders of other people's packages, rewritten as they are and compared with themselves."""
