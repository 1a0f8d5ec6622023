"""What the fork server imports once, and what is slow the first time that it is done."""

import matplotlib.pyplot as plt
import torch
from PIL import Image

from coca_lit import callbacks, lit_module  # noqa: F401
from coca_lit.cli.command import compose
from coca_lit.cli.train import run  # noqa: F401
from coca_lit.data.shards import laion  # noqa: F401
from coca_lit.evals import retrieval  # noqa: F401
from coca_lit.models import create_model
from coca_lit.projects.rewards import self_critical  # noqa: F401
from coca_lit.tools import report  # noqa: F401

THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # processes are forked from this one, and a pool of threads would not be there
Image.init()
compose("train", ["data=laion", "name=x", "+model.net.text_layers=1"])
create_model("coca_tiny")
plt.close(plt.figure())
