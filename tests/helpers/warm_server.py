"""What the first run of a process does once, so that the processes of the fork server need not; see forking.py."""

import gc

from coca_lit.cli.command import compose
from coca_lit.data.scenes.render import scene_training_captions
from coca_lit.metrics.captions import are_novel
from coca_lit.tools.report.figures import curves_figures

compose("train", ["trainer=smoke"])  # Hydra looks for plugins
curves_figures({"train/caption_loss": [(1, 2.0), (2, 1.0)]})  # Matplotlib looks for fonts
are_novel([], scene_training_captions())  # kept by both
gc.collect()
gc.freeze()  # else the collector would write to all objects, and each process need its own copy of them
