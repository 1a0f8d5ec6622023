"""The faults of experiments/faults/stores.py: a store that fails once, when it was planned, and says so."""

import random
import time
from collections import Counter
from http.client import HTTPConnection
from types import ModuleType

import pytest
from running import ROOT

pytest.importorskip("moto.server")

from faulty_store import AUTHORIZATION


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # which the import sets
    from experiments.faults import stores

    return stores


def asked(store) -> int | None:
    """The status of an answer to a request; None if there is none."""
    try:
        connection = HTTPConnection("127.0.0.1", store.port)
        connection.request("GET", "/bucket/a", headers={"Authorization": AUTHORIZATION})
        return connection.getresponse().status
    except OSError:
        return None


def test_a_store_fails_when_it_was_planned(stores: ModuleType) -> None:
    store = stores.Store()
    try:
        store.put("bucket", {"a": b"content"})
        store.plan(stores.Fault("slow down", 2, 2))
        assert asked(store) == 200
        assert not store.hit.is_set()
        assert [asked(store) for _ in range(3)] == [503, 503, 200]
        assert store.hit.is_set()
        store.plan(stores.Fault("outage", 0.3, 1))
        assert [asked(store) for _ in range(2)] == [None, None]
        while store.is_away:
            time.sleep(0.01)
        assert asked(store) == 200
    finally:
        store.close()


def test_faults_are_of_all_kinds(stores: ModuleType) -> None:
    rng = random.Random(0)
    drawn = [stores.drawn(rng) for _ in range(300)]
    counted = Counter(fault.kind for fault in drawn)
    assert set(counted) == {"outage", "slow down", "reset", "cut", "slow"}
    assert counted["outage"] > 60
    assert all(1 <= fault.amount <= 60 for fault in drawn)
