"""The tests on a simulated GPU need a process of their own, which `test_simulation.py` starts."""

import sys

collect_ignore = [] if "simulated_gpu" in sys.modules else ["simulated"]
