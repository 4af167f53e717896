"""What a submitted job runs where the checkout itself is uploaded: the `backlens` command, not installed.

Ray puts the uploaded folder on the import path of this process and of every worker, so driver and workers run
the code that was submitted, whatever the nodes have installed.
"""

from backlens.cli.entry import main

if __name__ == "__main__":
    main()
