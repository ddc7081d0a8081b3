"""``python -m cachefree``, the command line."""

import sys

from cachefree.cli import main

if __name__ == "__main__":
    sys.exit(main())
