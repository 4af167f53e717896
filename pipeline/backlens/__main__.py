"""`python -m backlens` is the `backlens` command."""

from backlens.cli.entry import main

if __name__ == "__main__":
    main()
