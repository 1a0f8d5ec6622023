"""Wrong captions of built-in scenes."""

from coca_lit.data.records import Record
from coca_lit.data.scenes.facts import scene_facts
from coca_lit.metrics.uncertainty import Ratios, exact
from coca_lit.projects.choice.scenes import scene_choice_records


def scores(caption: str, true: str) -> dict[str, tuple[float, float]]:
    """Precision and recall by kind."""
    found = exact(1, Ratios(scene_facts([Record(0, "x.png", [true])], {0: caption})))
    return {kind: (found[f"{kind}_precision"], found[f"{kind}_recall"]) for kind in ("object", "attribute", "relation")}


def test_wrong_captions_differ_in_what_their_kind_says() -> None:
    records = scene_choice_records("val", count=50)
    kinds = {kind: [record for record in records if record.domain == kind] for kind in ("order", "colour", "shape")}
    assert len(kinds["shape"]) == 50
    assert 30 < len(kinds["colour"]) < 50  # objects of one colour have no other order of colours
    assert len({record.id for record in records}) == len(records)
    for record in records:
        found = scores(record.captions[1], true=record.captions[0])
        assert found["relation"] == (0, 0)
        assert found["object"] == ((0.5, 0.5) if record.domain == "shape" else (1, 1))
        if record.domain == "order":
            assert found["attribute"] == (1, 1)
