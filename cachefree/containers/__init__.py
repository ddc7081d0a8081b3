"""What belongs to other libraries: how their objects meet a rewritten model."""

from cachefree.containers.generation import with_generate

__all__ = ["with_generate"]
