"""The command line: ``cachefree demo | explain | rewrite | verify | export | check``."""

from cachefree.cli.main import main

__all__ = ["main"]
