"""`python -m consistency_lens`, the same as the command `consistency-lens`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
