"""The tests on a simulated GPU run in the process that `gpu_check/test_simulation.py` starts."""

import sys

collect_ignore = [] if "simulated_gpu" in sys.modules else ["simulated"]
