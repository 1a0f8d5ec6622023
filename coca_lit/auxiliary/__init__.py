"""Further losses beside the network, with parameters of their own: a file each, and a few lines of config.

The network knows nothing of them, and neither do its checkpoints' readers: `load_model` gives the network alone.
"""

from coca_lit.auxiliary.base import AuxiliaryLoss

__all__ = ["AuxiliaryLoss"]
