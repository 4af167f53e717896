"""For every test: one thread for tensors too small for two, here and in the processes that tests start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
