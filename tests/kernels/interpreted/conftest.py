"""The tests of this folder run Triton kernels on the CPU, in a process of their own; see `test_interpreted.py` above."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":  # read by Triton when a kernel is declared
    collect_ignore_glob = ["test_*.py"]
