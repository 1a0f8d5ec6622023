"""The study of the family: its members have one size, and its scores and readings equal naive ones."""

from pathlib import Path

import pytest
import torch

from coca_lit.cli.command import compose
from coca_lit.data.scenes.render import scene_records
from coca_lit.data.transforms import build_transform
from coca_lit.evals import Settings
from coca_lit.tools.plan.command import build_without_weights
from experiments import study
from experiments.family import report
from experiments.family.family import DecoderRetrieval

FOLDER = Path(report.__file__).parent


@pytest.mark.slow
def test_members_are_of_one_size() -> None:
    """Within 4 % of CoCa's, the frozen parts of a loss that a member goes without included."""
    assert {path.stem for path in FOLDER.glob("member/*.yaml")} == {*report.MEMBERS}
    sizes = {}
    for member in report.MEMBERS:
        words = ["experiment=family_scenes", f"+member={member}", f"hydra.searchpath=[file://{FOLDER}]", "name=x"]
        net = build_without_weights(compose("train", words)).net
        sizes[member] = sum(p.numel() for p in net.parameters())
    assert all(abs(size / sizes["coca"] - 1) < 0.04 for size in sizes.values()), sizes


def test_decoder_retrieval_is_that_of_every_pair_read_alone(tiny_model, tmp_path) -> None:
    net, records = tiny_model(), scene_records("val", count=7)
    scored = DecoderRetrieval("few", records, images=6)
    found = scored.evaluate(net, Settings(tmp_path, batch_size=4))
    transform = build_transform(**net.preprocessing)
    images = torch.stack([transform(record.image()) for record in records[:6]])
    tokens = net.tokenizer([record.captions[0] for record in records[:6]])
    with torch.no_grad():
        read = torch.tensor([[net.log_likelihood(i[None], t[None]).item() for t in tokens] for i in images])
        cosines = net.encode_image(images) @ net.encode_text(tokens).T
    right = torch.arange(6)
    assert found["few/decoder_t2i_recall@1"] == pytest.approx((read.argmax(dim=0) == right).double().mean())
    surprising = read - read.exp().mean(dim=0).log()
    assert found["few/decoder_i2t_recall@1"] == pytest.approx((surprising.argmax(dim=1) == right).double().mean())
    assert found["few/cosine_t2i_recall@1"] == pytest.approx((cosines.argmax(dim=0) == right).double().mean())


def test_curves_and_seconds_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two members, of which one takes twice the time for a step: it is read in the middle of its curve."""
    for name, scores in {"scenes_coca_seed0": (0.2, 0.4), "scenes_cappa_seed0": (0.5, 0.9)}.items():
        (tmp_path / name).mkdir()
        lines = [f"{step},{score},0.7" for step, score in zip((99, 200), scores, strict=True)]
        text = "\n".join(["step,scenes/exact_match,scenes/t2i_recall@1", *lines])
        (tmp_path / name / "metrics.csv").write_text(text + "\n99,,\n")
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "CURVES", tmp_path / "curves.csv")
    report.add_curves([tmp_path / "scenes_coca_seed0"])
    report.add_curves(sorted(tmp_path.glob("*_seed0")))
    costs = [{"data": "scenes", "member": m, "seconds": s} for m, s in (("coca", "0.2"), ("cappa", "0.1"))]
    study.write_rows(tmp_path / "costs.csv", costs)
    about = dict.fromkeys(report.ABOUT_RUN, "x")
    rows = [about | {"run": f"{member}_seed0"} for member in ("coca", "cappa")]
    assert report.equal_seconds("scenes") == pytest.approx(20)
    coca, cappa = report.at_equal_seconds("scenes", rows)
    assert (coca["scenes/exact_match"], coca["scenes/t2i_recall@1"]) == ("0.2000", "0.7000")
    assert cappa["scenes/exact_match"] == "0.9000"
    assert "scenes/t2i_recall@1" not in cappa  # nothing has trained its cosines
