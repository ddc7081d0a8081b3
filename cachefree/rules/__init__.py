"""The rules that make one graph of two paths, in the order in which they are tried."""

from cachefree.rules.rule import Closing, close

__all__ = ["Closing", "close"]
