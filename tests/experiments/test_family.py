"""The study of the family: its members have one size, and its scores and readings equal naive ones."""

from pathlib import Path

import pytest
import torch

from coca_lit.cli.command import compose
from coca_lit.data.scenes.render import scene_records
from coca_lit.data.transforms import build_transform
from coca_lit.evals import Settings
from coca_lit.tools.plan.command import build_without_weights
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
