"""`python -m manylora.launch_server …`: the seeds' spelling of `manylora serve …`."""

import sys

from manylora.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
