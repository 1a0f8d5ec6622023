"""The comparison of released models with OpenCLIP, with random weights under a released name."""

import json
import sys
from pathlib import Path

import pytest
import torch

from coca_lit.models import CoCa, create_model
from coca_lit.tools.export.open_clip import write_open_clip
from helpers.hub_server import Hub, Repository, answers_at

pytestmark = pytest.mark.slow  # OpenCLIP is loaded
NAME = "coca_ViT-L-14/dfn2b_s13b_context77"
SMALL = {
    "image_encoder_args": {"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 1},
    **{"image_size": 32, "embed_dim": 64, "pooler_queries": 3, "pooler_heads": 2, "text_width": 64, "text_heads": 1},
    **{"context_length": 40, "text_layers": 1, "decoder_layers": 1, "cls_mask": "legacy"},
}


def test_a_record_says_how_far_both_are_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("open_clip")
    from experiments.released import compare

    torch.manual_seed(0)
    write_open_clip(create_model("coca_ViT-B-32", **SMALL), tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", ["compare.py", NAME, "--output", str(tmp_path / "records")])
    with Hub() as hub:
        hub.repositories["apple/mobileclip2_coca_dfn2b_s13b_context77"] = Repository(files)
        answers_at(monkeypatch, hub.url, tmp_path / "cache")
        compare.main()
        written = tmp_path / "records" / f"{NAME.replace('/', '_')}.json"
        record = json.loads(written.read_text())
        assert record["equal"]
        assert record["same tokens"]
        assert record["same greedy captions"] == 7
        assert record["differences"]["caption logits"] < 1e-4
        assert record["scores"]["coca_lit"] == pytest.approx(record["scores"]["OpenCLIP"], abs=1e-4)
        assert len(record["sha256"]) == 64

        monkeypatch.setattr(CoCa, "encode_image", None)  # not what is compared
        forward = CoCa.forward
        monkeypatch.setattr(CoCa, "forward", lambda net, images, tokens: forward(net, images, tokens.flip(0)))
        with pytest.raises(SystemExit, match="apart"):
            compare.main()
        assert not json.loads(written.read_text())["equal"]
