"""Clips where plans are counted, graphs exported and folders shown."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coca_lit.cli.command import compose
from coca_lit.data.inputs import IMAGES
from coca_lit.data.scenes.render import scene_records
from coca_lit.errors import ConfigError
from coca_lit.models import CoCa, create_model
from coca_lit.projects.video.clips import ClipReader
from coca_lit.projects.video.inputs import Clips
from coca_lit.tools.demo import command as demo
from coca_lit.tools.export import command as export
from coca_lit.tools.export.open_clip import write_open_clip
from coca_lit.tools.plan import command as plan
from coca_lit.tools.plan.trace import trace
from coca_lit.tools.search.index import ImageIndex
from coca_lit.weights.load import save_model

WEIGHTS, TOKENS, BATCH = {"contrastive": 1.0, "caption": 2.0}, 12, 8


def test_clips_stay_in_the_index_of_a_page(tmp_path: Path, tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page shows none, a search finds them."""
    pytest.importorskip("av")
    pytest.importorskip("gradio")
    from helpers.clips import greys, write_clip

    shown = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("coca_lit.tools.demo.page.build_page", lambda *args, **_: shown.append(args))
    monkeypatch.setattr("coca_lit.tools.demo.page.serve", lambda *args: None)
    (tmp_path / "photos").mkdir()
    for record in scene_records("val", count=3):
        record.image().save(tmp_path / "photos" / f"{record.id}.png")
    model = tiny_model()
    save_model(model, tmp_path / "tiny.safetensors")
    write_clip(tmp_path / "photos" / "a.mp4", greys(range(0, 200, 20)))
    file = tmp_path / "photos.index.safetensors"
    index = ImageIndex(model, tmp_path / "photos", {"frames": 2})
    index.update()
    index.save(file)
    demo.run(compose("demo", ["checkpoint=tiny.safetensors", "images=photos"]))
    assert [len(shown[0][2]), len(ImageIndex.load(file, model))] == [3, 4]


def test_how_frames_are_pooled_is_said_beside_files_of_open_clip(tmp_path: Path) -> None:
    """OpenCLIP's config has no key for it."""
    encoder = {
        "image_encoder": "vit_base_patch32_clip_224",
        "image_encoder_args": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 1},
    }
    for pooling, said in (("tokens", False), ("mean", True)):
        folder = tmp_path / pooling
        folder.mkdir()
        sizes = {"tokenizer": "clip", "cls_mask": "legacy", "context_length": 8}
        model = create_model("coca_tiny", frame_pooling=pooling, **encoder, **sizes).eval()
        assert any("frame_pooling=mean" in limit for limit in write_open_clip(model, folder).limits) is said


def without_weights(**arguments: str) -> CoCa:
    with torch.device("meta"):
        return create_model("coca_tiny", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("frame_pooling", ["tokens", "mean"])
def test_frames_of_clips(frame_pooling: str) -> None:
    real = create_model("coca_tiny", frame_pooling=frame_pooling).train()
    tokens = torch.randint(3, real.tokenizer.vocab_size, (BATCH, TOKENS))
    clips = Clips(torch.zeros(BATCH, 4, 3, 32, 32, dtype=torch.uint8))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        real(clips, tokens, torch.full((BATCH,), TOKENS))
    reader = ClipReader(4)
    found = trace(without_weights(frame_pooling=frame_pooling), WEIGHTS, TOKENS, None, BATCH, reader=reader)
    of_images = trace(without_weights(), WEIGHTS, TOKENS, None, BATCH)
    assert found.forward["image encoder"] == 4 * of_images.forward["image encoder"]
    parts = ("image encoder", "pooling", "text tower", "decoder")
    assert sum(found.forward[part] for part in parts) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_plan_counts_the_frames_of_the_data() -> None:
    assert plan.reader_of(compose("plan", ["experiment=scenes_motion"])).leading == (4,)
    assert plan.reader_of(compose("plan", ["experiment=pretrain_b32", "data=msrvtt"])).leading == (8,)
    assert plan.reader_of(compose("plan", ["experiment=demo"])) is IMAGES


SIZES = {"text_layers": 1, "decoder_layers": 1}
MODELS = {
    "mean of frames": {"pooler": "openclip_cascade", "pooler_queries": 5, "frame_pooling": "mean"},
    "positions of frames": {"pooler": "means_of_tokens", "frame_positions": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_graphs_of_clips(name: str, tmp_path: Path) -> None:
    """Features and greedy captions of clips of three frames, of a batch that is larger than the exporter's example."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from coca_lit.tools.export import onnx
    from coca_lit.tools.export.onnx_captioner import Captioner

    torch.manual_seed(0)
    model = create_model("coca_tiny", imports=["helpers.means_of_tokens"], **SIZES | MODELS[name]).eval()
    with torch.no_grad():
        model.decoder.vocabulary.weight[model.tokenizer.eot_id] *= 2
        for name in model.pooling.added:
            getattr(model.pooling, name).normal_()
    about = onnx.write_onnx(model, tmp_path, ClipReader(3))
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (5, 3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    session = onnxruntime.InferenceSession(tmp_path / "image_encoder.onnx")
    found = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
    torch.testing.assert_close(found, model.encode_image(Clips(images)).detach(), atol=1e-5, rtol=0)
    captioner, captions = Captioner(tmp_path), model.generate(Clips(images))
    ids = captioner.write(images.numpy())
    assert ids.tolist() == captions.tolist()
    assert [captioner.decode(row) for row in ids] == [model.tokenizer.decode(row) for row in captions]
    assert {*programs(tmp_path, images[0], about.usage)} == {model.tokenizer.decode(captions[0])}


def programs(folder: Path, clip: torch.Tensor, usage: str) -> Iterator[str]:
    """What the code of the card and the program write of a clip."""
    for i, frame in enumerate(clip):
        Image.fromarray(np.asarray(frame.permute(1, 2, 0))).save(folder / f"picture{i}.png")
    code = usage.replace("{folder}", str(folder)).replace('f"picture{i}.jpg"', f'f"{folder}/picture{{i}}.png"')
    for words in (["-c", code], [folder / "captioner.py", *sorted(folder.glob("picture*.png"))]):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        yield done.stdout.splitlines()[0].rpartition("\t")[2]


def test_frames_belong_to_graphs(tmp_path: Path, tiny_model) -> None:
    save_model(tiny_model(), tmp_path / "tiny.safetensors")
    words = [f"checkpoint={tmp_path}/tiny.safetensors", f"output={tmp_path}/model", "format=safetensors", "frames=8"]
    with pytest.raises(ConfigError, match=r"^frames .*format=onnx.*safetensors"):
        export.run(compose("export", words))
