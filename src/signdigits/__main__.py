"""`python -m signdigits`, the command line."""

import sys

from signdigits.cli import main

if __name__ == "__main__":
    sys.exit(main())
