"""What holds for every member of the family: presets, files, training, attention, generation, re-ranking, graphs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coca_lit.data.transforms import build_transform
from coca_lit.evals.inference import log_likelihoods
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.models.generation.generate import Captions
from coca_lit.models.presets import preset
from coca_lit.tools.export.open_clip import write_open_clip
from coca_lit.tools.plan.trace import trace
from coca_lit.weights.load import load_model, save_model
from coca_lit.weights.start import copy_weights, stretch
from helpers.evaluating import make_model, records
from helpers.parallel import SHARDED, saved, train


def check_packed_training(model: CoCa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features, hidden states and gradients are equal with and without padding, whatever is computed again."""
    lengths = torch.tensor([5, 24, 2, 9])
    tokens = torch.randint(4, 40, (4, 24)).masked_fill(torch.arange(24) >= lengths[:, None], 0)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = []
    for threshold in (1.0, -1.0):
        monkeypatch.setattr("coca_lit.models.packing.WORTHWHILE_PADDING", threshold)
        for recompute in ("none", "blocks", "cross_attention"):
            model.set_grad_checkpointing(recompute)
            model.zero_grad()
            out = model(pixels, tokens, lengths)
            sum(loss_terms(out).values()).backward()
            assert all(p.grad is not None for p in model.parameters())
            found.append([out.text_features, out.hidden, *(p.grad.clone() for p in model.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-9)


def check_files(model: CoCa, folder: Path, version: str = "4") -> None:
    """OpenCLIP's file and ours give the model back, and OpenCLIP 3 has no such model."""
    write_open_clip(model, folder, version=version)
    loaded = load_model(folder / "open_clip_model.safetensors")
    assert loaded.config == model.config
    assert loaded.preprocessing == model.preprocessing
    save_model(model, folder / "ours.safetensors")
    assert load_model(folder / "ours.safetensors").config == model.config
    with pytest.raises(ValueError, match=r"OpenCLIP 4|version="):
        write_open_clip(model, folder)


def check_cached_generation(model: CoCa, pixels: Tensor) -> Captions:
    """The log-probabilities of beams are those of the whole pass; returns the beams."""
    beams = model.generate(pixels, strategy="beam", num_beams=3, num_captions=3, prompt="a red", return_scores=True)
    for i in range(len(pixels)):
        lengths = (beams.ids[i] == model.tokenizer.eot_id).int().argmax(-1) + 1
        prefix = model.log_likelihood(pixels[i : i + 1], beams.ids[i, :1, :3], torch.tensor([3]))
        expected = model.log_likelihood(pixels[i : i + 1], beams.ids[i], lengths) - prefix
        torch.testing.assert_close(beams.log_probs[i] * (lengths - 3), expected, atol=1e-4, rtol=1e-4)
    return beams


def check_preset(name: str) -> None:
    """It runs when it is made small, and is built again from its config."""
    small = {"embed_dim": 32, "pooler_heads": 4, "text_width": 32, "text_heads": 4, "text_layers": 1}
    arguments = preset(name)
    if not arguments["image_encoder"].startswith(("resnet", "tf_efficientnet")):
        vit = {"embed_dim": 32, "depth": 1, "num_heads": 2}
        small["image_encoder_args"] = arguments.get("image_encoder_args", {}) | vit
    model = create_model(name, **small, decoder_layers=min(1, arguments.get("decoder_layers", 1))).eval()
    images = torch.randint(0, 256, (2, 3, model.image_size, model.image_size), dtype=torch.uint8)
    tokens = model.tokenizer(["a", "a red circle"])
    out = model(images, tokens)
    assert out.image_features.shape == out.text_features.shape == (2, 32)
    if model.decoder is None:
        assert out.hidden is None
    else:
        count = int(model.lengths_of(tokens).sum()) - 2  # all but the start of each text
        assert out.logits.shape == (count, model.tokenizer.vocab_size)
    again = CoCa(**json.loads(json.dumps(model.config.stored())))
    assert again.config == model.config
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@torch.no_grad()
def check_attention_of_the_decoder(**arguments: Any) -> None:
    """Softmax of q · k / √d, with the queries of an ordinary pass: the mean over layers and heads."""
    model = create_model("coca_tiny", **arguments).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    decoder, queries = model.decoder, []
    layers = [module for module in decoder.modules() if hasattr(module, "q") and hasattr(module, "kv")]
    for layer in layers:
        layer.q.register_forward_hook(lambda _, __, out: queries.append(out))
    image_tokens = model.encode_image_tokens(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    states = torch.randn(2, 6, model.config.text_width)
    decoder(states, image_tokens)
    found = []
    for layer, q, (keys, _) in zip(layers, queries, decoder.keys_values(image_tokens), strict=True):
        q = q.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        found.append((q @ keys.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1))
    torch.testing.assert_close(decoder.attention(states, image_tokens), torch.stack(found).mean(0))


@torch.no_grad()
def check_each_text_passes_the_tower_once(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> None:
    """When texts are re-ranked."""
    model = make_model(**arguments)
    texts = [caption for record in records() for caption in record.captions] + ["one unheard two"]
    passed = []
    step = model.text.step
    monkeypatch.setattr(model.text, "step", lambda tokens, *rest: passed.append(len(tokens)) or step(tokens, *rest))
    found = log_likelihoods(model, records(), texts, lambda i: range(i, len(texts), 2), batch_size=5)
    assert sum(passed) == len(texts)
    transform = build_transform(**model.preprocessing)
    for i, record in enumerate(records()):
        own = texts[i::2]
        pixels = transform(record.image()).expand(len(own), -1, -1, -1)
        torch.testing.assert_close(found[i], model.eval().log_likelihood(pixels, model.tokenizer(own)))


def check_planned_flops(freeze: bool = False, **arguments: Any) -> None:
    """The plan's are those of PyTorch's counter in a real step."""
    size, length, weights = 8, 12, {"contrastive": 1.0, "caption": 2.0}
    real = create_model("coca_tiny", **arguments).train()
    with torch.device("meta"):
        planned = create_model("coca_tiny", **arguments)
    if freeze:
        real.freeze("image_encoder")
        planned.freeze("image_encoder")
    tokens = torch.randint(3, real.tokenizer.vocab_size, (size, length))
    images = torch.zeros(size, 3, real.image_size, real.image_size, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = real(images, tokens, torch.full((size,), length))
        torch.stack(list(loss_terms(out).values())).sum().backward()
    step = trace(planned, weights, length, None, size)
    # The counter has no in-place addmm, which makes the vocabulary's gradient, and the plan leaves out the contrastive
    # logits, which depend on the global batch.
    vocabulary = 2 * size * (length - 1) * real.decoder.vocabulary.weight.numel() if real.decoder else 0
    logits = 4 * 2 * size * size * 96
    assert step.total == pytest.approx(counter.get_total_flops() + vocabulary - logits, rel=0.01)
    assert sum(step.forward.values()) < step.total


def check_graphs(model: CoCa, folder: Path) -> None:
    """ONNX Runtime computes the features and writes the greedy captions of a batch that is larger than the exporter's
    example.
    """
    pytest.importorskip("onnxscript")
    import onnxruntime

    from coca_lit.tools.export import onnx
    from coca_lit.tools.export.onnx_captioner import Captioner

    with torch.no_grad():
        model.decoder.vocabulary.weight[model.tokenizer.eot_id] *= 2
    onnx.write_onnx(model, folder)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    tokens = model.tokenizer(["a red circle", "two blue squares and a green ring", ""])
    for graph, inputs, expected in (
        ("image_encoder", {"images": images.numpy()}, model.encode_image(images)),
        ("text_encoder", {"tokens": tokens.numpy()}, model.encode_text(tokens)),
    ):
        session = onnxruntime.InferenceSession(folder / f"{graph}.onnx")
        found = torch.from_numpy(session.run(["features"], inputs)[0])
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)
    captioner, captions = Captioner(folder), model.generate(images)
    ids = captioner.write(images.numpy())
    assert ids.tolist() == captions.tolist()
    assert [captioner.decode(row) for row in ids] == [model.tokenizer.decode(row) for row in captions]


def check_sharded_training(on_ranks: Callable[..., list[Any]], folder: Path, *overrides: str) -> None:
    """Two ranks that share the parameters end with those of one process."""
    options = ("data.train_count=32", *overrides)
    train(folder / "one", *options)
    on_ranks(2, train, folder / "sharded", *options, *SHARDED)
    found, expected = saved(folder / "sharded")["state_dict"], saved(folder / "one")["state_dict"]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def check_start_with_another_context(source: CoCa, model: CoCa) -> None:
    """The positions of a text are stretched. Captions of the new length are written, and every text reads as before
    within the kept positions.
    """
    texts = ["a dog"]
    before, length = source.config.context_length, model.config.context_length
    torch.nn.init.normal_(source.text.position_embedding, std=0.1)
    copy_weights(source, model, "file")
    rows, given = model.text.position_embedding, source.text.position_embedding
    assert torch.equal(rows[:length], stretch(given[:before], length))
    torch.testing.assert_close(model.encode_text(model.tokenizer(texts)), source.encode_text(source.tokenizer(texts)))
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    ids = model.generate(images, min_length=length - 1, max_length=length)
    assert int(ids[0, -1]) == model.tokenizer.eot_id
