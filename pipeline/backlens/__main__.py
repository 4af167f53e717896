"""`python -m backlens` is the `backlens` command."""

import sys

from backlens.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
