"""What the fork server imports once, and what is slow the first time that it is done."""

import matplotlib.pyplot as plt
from PIL import Image

from coca_lit.cli.command import compose
from coca_lit.models import create_model

Image.init()
compose("train", ["data=laion", "name=x", "+model.net.text_layers=1"])
create_model("coca_tiny")
plt.close(plt.figure())
