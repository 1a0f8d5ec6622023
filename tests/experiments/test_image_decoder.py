"""The study that extends the package from outside: an objective and a callback of its own, joined by its own YAML."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from coca_lit.models import CoCa, create_model
from coca_lit.weights.load import load_model
from experiments.image_decoder.image_decoder import ImageDecoder
from helpers.running import ROOT, train_py


@pytest.fixture(scope="module")
def net() -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny").eval()


def built(net: CoCa, **options: Any) -> ImageDecoder:
    decoder = ImageDecoder(**options)
    decoder.build(net)
    return decoder


def test_a_drawing_depends_on_the_caption_alone(net: CoCa) -> None:
    torch.manual_seed(0)
    decoder = built(net).eval()
    tokens, lengths = net.tokenizer(["a large red ring", "a small blue star"]), torch.tensor([6, 6])
    drawn = decoder.draw(net, tokens, lengths)
    assert drawn.shape == (2, 3, 32, 32)
    torch.testing.assert_close(decoder.draw(net, tokens[:1, :6], lengths[:1]), drawn[:1], atol=1e-5, rtol=1e-5)
    padded = tokens.clone()
    padded[:, 6:] = 9  # behind the end
    torch.testing.assert_close(decoder.draw(net, padded, lengths), drawn, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)


def test_patches_lie_where_they_belong(net: CoCa) -> None:
    """With a head that draws its own patch number, the picture counts from left to right and from top to bottom."""
    decoder = built(net, size=8, patch=4)
    numbers = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 48)
    decoder.blocks = torch.nn.Module()
    decoder.blocks.forward = lambda *_, **__: numbers  # type: ignore[method-assign]  # in place of the transformer
    decoder.pixels = torch.nn.Identity()
    drawn = decoder.draw(net, net.tokenizer("a ring"), torch.tensor([4]))[0, 0]
    assert drawn[::4, ::4].tolist() == [[0, 1], [2, 3]]
    assert drawn[3, 3] == 0


@pytest.mark.slow
def test_a_run_from_the_command_line_draws(tmp_path: Path) -> None:
    done = train_py(
        *("--config-dir", str(ROOT / "experiments" / "image_decoder"), "experiment=image_decoder", "trainer=smoke"),
        *(f"output_dir={tmp_path}", "scoring.images=8", "evals=[scenes_retrieval]"),
        *("data.train_count=16", "data.batch_size=8"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "samples" / "drawings.png").size[0] > 300
    assert "train/image_decoder_loss" in (tmp_path / "metrics.csv").read_text()
    assert "val/image_decoder_loss" in (tmp_path / "metrics.csv").read_text()
    assert ">drawings</h2>" in (tmp_path / "report.html").read_text()
    assert not [n for n in load_model(tmp_path / "checkpoints" / "last.ckpt").state_dict() if "image_decoder" in n]
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    trained = state["optimizer_states"][0]["state"]
    assert len(trained) == sum(1 for name in state["state_dict"] if _is_parameter(name))


def _is_parameter(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
