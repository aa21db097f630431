"""`python -m seglight` is the `seglight` command."""

import sys

from seglight.cli import main

if __name__ == "__main__":
    sys.exit(main())
