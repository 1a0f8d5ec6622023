"""The model card: what the model is, where it comes from, its scores, how to load it. The front matter is for the
Hugging Face Hub.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from coca_lit.export.folder import CARD, TAG
from coca_lit.models import CoCa, part_sizes
from coca_lit.report.scores import cell, score_name
from coca_lit.report.tables import Table, markdown
from coca_lit.runs.run_folder import commit

TRAINING = ("seed", "image_size", "init_from", "image_weights", "lora", "ema", "model", "data", "trainer")


class Exported(NamedTuple):
    """The facts of a format for the card."""

    library: str  # that loads it, by the Hub's name
    files: dict[str, str]  # name -> description
    needs: str  # packages that `usage` needs
    usage: str  # Python code, with {folder} in place of the name of the folder
    check: str  # the comparison that was made, and its result
    limits: list[str]  # sentences, with {folder} too


def write_card(folder: Path, name: str, model: CoCa, exported: Exported, checkpoint: Path, command: str) -> None:
    """Writes `README.md`. Scores and training are read from the run folder in which the checkpoint lies."""
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    environment = json.loads(_text(run / "environment.json") or "{}")
    config = yaml.safe_load(_text(run / "config.yaml") or "{}")
    sections = [
        _front_matter(model, exported),
        f"# {name}\n\n{_summary(model)}",
        f"## Use\n\nNeeds {exported.needs}. In the folder that holds `{name}`:\n\n```python\n"
        f"{exported.usage.replace('{folder}', name)}```",
        _table("Files", ("file", "what it is"), ((f"`{file}`", what) for file, what in exported.files.items())),
        _table("Architecture", ("", ""), _architecture(model).items()),
        _scores(run, config, checkpoint.name),
        _training(config, environment),
        f"## Export\n\n```bash\n{command}\n```\n\n" + (f"At commit {commit()}. " if commit() else "") + exported.check,
        _limits(exported, name),
    ]
    (folder / CARD).write_text("\n\n".join(sections) + "\n")


def _front_matter(model: CoCa, exported: Exported) -> str:
    tasks = ["image-to-text"] if model.decoder is not None else []
    tags = dict.fromkeys([TAG, "coca" if tasks else "clip", *tasks, "zero-shot-image-classification", exported.library])
    content = {
        "library_name": exported.library,
        "pipeline_tag": "image-to-text" if tasks else "zero-shot-image-classification",
        "tags": list(tags),
    }
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _summary(model: CoCa) -> str:
    if model.decoder is None:
        return "A CLIP: it embeds images and texts in a common space, for retrieval and zero-shot classification."
    return (
        "A Contrastive Captioner ([CoCa](https://arxiv.org/abs/2205.01917)): it embeds images and texts in a common"
        " space, for retrieval and zero-shot classification, and writes captions."
    )


def _architecture(model: CoCa) -> dict[str, Any]:
    config = model.config
    words = "CLIP's byte pairs" if config["tokenizer"] == "clip" else "words"
    decoder = f"{config['decoder_layers']} layers of width {config['text_width']}, {config['text_heads']} heads"
    arguments = ", ".join(f"{key}={value}" for key, value in config["image_encoder_args"].items())
    return {
        "image encoder": f"`{config['image_encoder']}` of timm" + (f" with {arguments}" if arguments else ""),
        "image size": f"{config['image_size']} pixels",
        "pooler": f"{config['pooler']}, {config['pooler_queries']} queries, {config['pooler_heads']} heads",
        "common space": f"{config['embed_dim']} dimensions",
        "text tower": f"{config['text_layers']} layers of width {config['text_width']}, {config['text_heads']} heads",
        "decoder": decoder if model.decoder is not None else "none",
        "tokenizer": f"{model.tokenizer.vocab_size:,} {words}, {config['context_length']} tokens of context",
        "CLS mask": config["cls_mask"],
        **{f"parameters, {part}": f"{size:,}" for part, size in part_sizes(model).items()},
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }


def _scores(run: Path, config: Mapping[str, Any], checkpoint: str) -> str:
    results = json.loads(_text(run / "results.json") or "{}")
    if not results:
        return "## Scores\n\nUnknown: there was no `results.json` of a run next to the checkpoint."
    data = list(dict.fromkeys(key.rpartition("/")[0] for key in results))
    scores = dict.fromkeys(key.rpartition("/")[2] for key in results)
    rows = [[score_name(s), *(cell(s, results.get(f"{name}/{s}")) for name in data)] for s in scores]
    note = [f"At the end of the run; `{checkpoint}` may be from another step."] if checkpoint != "last.ckpt" else []
    if split := config.get("scoring", {}).get("split"):
        note.append(f"On the split `{split}` of data with several splits.")
    return _table("Scores", ("", *data), rows, " ".join(note))


def _training(config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    if not config:
        return "## Training\n\nUnknown: there was no `config.yaml` of a run next to the checkpoint."
    source = str(config.get("data", {}).get("_target_", "unknown")).rpartition(".")[2]
    where = next((config["data"][key] for key in ("shards", "root", "name") if key in config.get("data", {})), None)
    settings = yaml.safe_dump({key: config[key] for key in TRAINING if key in config}, sort_keys=False)
    facts = {key: environment[key] for key in ("commit", "machine", "seconds", "torch") if environment.get(key)}
    lines = [f"Data: `{source}`" + (f", `{where}`." if where else ".")]
    if environment.get("command"):
        lines += ["", f"```bash\n{environment['command']}\n```"]
    lines += ["", ", ".join(f"{key}: {value}" for key, value in facts.items())] if facts else []
    lines += ["", f"<details><summary>Configuration</summary>\n\n```yaml\n{settings}```\n\n</details>"]
    return "## Training\n\n" + "\n".join(lines)


def _limits(exported: Exported, name: str) -> str:
    limits = [
        "The licence of the weights is not stated: it depends on the training data, and on the initial weights."
        " Add `license:` to the front matter once it is known.",
        "The model reproduces errors and biases of its training data; the scores above are all that is known of its"
        " quality.",
        *(limit.replace("{folder}", name) for limit in exported.limits),
    ]
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _table(title: str, header: Iterable[str], rows: Iterable[Iterable[Any]], note: str = "") -> str:
    table = markdown(Table(title, [*header], [[str(cell) for cell in row] for row in rows]))
    return "\n\n".join([f"## {title}", table, *([note] if note else [])])


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
