"""What several test files share: a small model, the folder of real data, and real process groups."""

import gc
import multiprocessing
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # else functions import what takes seconds: the process that hands out the tests needs none of it
    from coca_lit.models import CoCa
    from coca_lit.testing import Ranks

# Tests on a simulated GPU need a process of their own, which `gpu_check/test_simulation.py` starts.
collect_ignore_glob = [] if "simulated_gpu" in sys.modules else ["*/simulated"]

gc.disable()  # until the first test, see `_only_new_garbage`; the process that hands out tests has nothing to collect
os.environ["COCA_SPICE_JARS"] = os.devnull  # else tests would parse for minutes where the user has the jars


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two processes run tests side by side, and on tensors too small to share among cores."""
    import torch

    torch.set_num_threads(1)


# These two are for speed alone; without them and the line above `pytest` takes a fifth longer.


@pytest.fixture(scope="session", autouse=True)
def _files_of_conf_are_read_once() -> Iterator[None]:
    """Tests compose hundreds of configs from the same files, and a third of the time would go into parsing them."""
    from omegaconf import OmegaConf

    from coca_lit.cli.command import CONF

    load, shipped = OmegaConf.load, dict[str, bytes]()

    def load_once(file: Any) -> Any:
        path = str(getattr(file, "name", file))
        if not path.startswith(f"{CONF}/"):  # a test's own
            return load(file)
        if path not in shipped:
            shipped[path] = pickle.dumps(load(file))
        return pickle.loads(shipped[path])  # a copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", load_once)
        yield


@pytest.fixture(scope="module", autouse=True)
def _only_new_garbage() -> None:
    """Libraries are a million objects that stay; a tenth of the time would go into looking for garbage among them."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else Triton reports at the end what has not been collected as leaked


@pytest.fixture(autouse=True)
def _independent_of_other_tests() -> Iterator[None]:
    """The same random numbers for a test, and what a run changes for its whole process only until the test ends."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads, before = torch.get_num_threads(), dict(os.environ)
    yield
    torch.set_num_threads(threads)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


PASSED: pytest.StashKey[bool] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    item.stash[PASSED] = item.stash.get(PASSED, True) and not report.failed
    return report


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As pytest's own, but not named after the test: messages name files, and a word of them would always be found."""
    path = tmp_path_factory.mktemp("t")
    yield path
    if request.node.stash[PASSED]:
        shutil.rmtree(path, ignore_errors=True)  # gigabytes would wait for the disk


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile input tries to make."""
    path = tmp_path / "outside" / "ran"
    path.parent.mkdir()
    yield path
    assert not path.exists()


@pytest.fixture
def forked_workers() -> Iterator[None]:
    """Data workers find what a test keeps in memory, or has patched; on macOS they are not forked by themselves."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture
def tiny_model() -> "Callable[..., CoCa]":
    """`tiny_model(**overrides)`: the smallest preset, in evaluation mode, with the same weights every time."""
    import torch

    from coca_lit.models import create_model

    def build(**overrides: Any) -> "CoCa":
        torch.manual_seed(0)
        return create_model("coca_tiny", **overrides).eval()

    return build


@pytest.fixture(scope="session")
def on_ranks() -> "Iterator[Ranks]":
    """`on_ranks(world, function, *arguments)`: what a picklable function returns on each of `world` gloo processes."""
    from coca_lit.testing import Ranks

    with Ranks() as ranks:
        yield ranks


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tests of what an extra brings say which package they lack; how to get them all stands once."""
    skipped = terminalreporter.stats.get("skipped", [])
    if lacking := sum("could not import" in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(f"{lacking} tests or files of tests need packages of: pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def forged_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a module that forges files."""
    return tmp_path_factory.mktemp("fuzz")
