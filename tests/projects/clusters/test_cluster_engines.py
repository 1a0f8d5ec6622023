"""Options of the engines that need a cluster; test_slurm.py and test_ray.py run them."""

import pytest

from coca_lit.errors import ConfigError
from coca_lit.projects.clusters.engines import Slurm
from coca_lit.tools.engines import engine_from


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("engine=slrum", "'engine' has no option 'slrum'; did you mean 'slurm'"),
        ("engine=slurm engine.tasks_per_node=8", "engine.nodes and engine.tasks_per_node must be 1"),
        ("engine=slurm engine.shards_per_job=0", "engine.shards_per_job must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_sentence(words: str, message: str) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError) as raised:
        engine_from(words.split())
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_keys_of_launchers_are_keys_of_engines() -> None:
    pytest.importorskip("submitit")
    words = ["engine=slurm", "engine.partition=gpu", "engine.timeout_min=7", "engine.shards_per_job=3"]
    engine = engine_from(words, ["cpu", "cpu"])
    assert isinstance(engine, Slurm)
    assert (engine.options["partition"], engine.options["timeout_min"], engine.size) == ("gpu", 7, 3)
    assert engine.machine.devices == ["cpu", "cpu"]  # of `coca-data check … --workers 2`
    assert engine_from(words).machine.devices is None  # a model has the GPU of its job
