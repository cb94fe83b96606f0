"""`python -m manylora …` is the same as the `manylora` command."""

import sys

from manylora.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
