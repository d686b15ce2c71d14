"""``python -m sp_compile``."""

import sys

from sp_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
