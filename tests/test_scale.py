"""The scaling study's simulation against the formula it is drawn beside, and its volumes against hand-worked cases."""

import importlib.util
import random
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "scale" / "scale.py"
spec = importlib.util.spec_from_file_location("scale", SCRIPT)
assert spec is not None
assert spec.loader is not None
scale = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scale)


def test_simulated_losses_follow_the_formula_and_are_least_at_youngs_interval() -> None:
    def lost(interval: float) -> float:
        runs = [scale.simulate(interval, 30, 300, 1e5, 2e6, random.Random(i)) for i in range(200)]
        return sum(runs) / len(runs)

    best = scale.young_daly(30, 1e5)
    assert lost(best) == pytest.approx(scale.lost_share(best, 30, 300, 1e5), rel=0.1)
    assert lost(best) < min(lost(best / 3), lost(best * 3))


def test_volumes_by_hand() -> None:
    assert scale.ddp_bytes(400, 2) == 400
    assert scale.fsdp_bytes(400, 300, 400, 4) == 825
    assert scale.feature_bytes(10, 8, 2) == 640
