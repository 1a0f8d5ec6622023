"""Shipped experiments fit the devices that their headers name, by the plan of `coca-plan`."""

import re

import pytest

from coca_lit.cli.command import compose
from coca_lit.tools.plan.command import build_without_weights, estimate, read_settings
from coca_lit.tools.plan.estimate import largest_batch
from helpers.running import CONFIGS

EXPERIMENTS = [path for folder in CONFIGS for path in sorted(folder.glob("experiment/[!_]*.yaml"))]
HEADERS = {path.stem: path.read_text() for path in EXPERIMENTS}
NEEDS = re.compile(r"^# Needs:.*?(one|\d+) (?:GPU|A100|H100)s? with (\d+) GB", re.MULTILINE)
ON_GPUS = {name: found for name, text in HEADERS.items() if (found := NEEDS.search(text))}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HEADERS.keys() - ON_GPUS.keys()))
def test_the_others_need_no_gpu(name: str) -> None:
    needs = next(line for line in HEADERS[name].splitlines() if line.startswith("# Needs:"))
    assert not re.search("GPU|A100|H100", needs)


# They train the networks of others with as much memory or less.
SMALLER = {"clip_b32", "finetune_mscoco", "finetune_mscoco_keep", "finetune_snli_ve"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ON_GPUS.keys() - SMALLER))
def test_it_fits_its_gpus(name: str) -> None:
    count, memory = ON_GPUS[name].groups()
    devices = 1 if count == "one" else int(count)
    cfg = compose("plan", [f"experiment={name}", f"devices={devices}"])
    model, cost, recipe = estimate(cfg, read_settings(cfg), build_without_weights(cfg))
    assert recipe.batch % devices == 0
    assert largest_batch(float(memory), model, cost, recipe, 3 * cfg.image_size**2) >= recipe.batch // devices
