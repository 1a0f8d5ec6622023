"""What the fork server imports once, and what is slow the first time that it is done."""

import hydra
import matplotlib.pyplot as plt
from PIL import Image

import coca_lit.callbacks
import coca_lit.checkpoint_io
import coca_lit.data.laion
import coca_lit.data.scenes_data
import coca_lit.lit_module
import coca_lit.metrics_log
import coca_lit.optim
import coca_lit.report.write
import coca_lit.resume
from coca_lit import cli
from coca_lit.models import create_model

Image.init()
with hydra.initialize_config_dir(str(cli.CONF), version_base="1.3"):
    hydra.compose("train", ["data=laion", "name=x", "+model.net.text_layers=1"])
create_model("coca_tiny")
plt.close(plt.figure())
