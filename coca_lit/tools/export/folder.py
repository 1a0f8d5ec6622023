"""The folder of an export, which appears whole or not at all and replaces only an earlier export, and the model card in
it: what the model is, where it comes from, its scores, how to load it. The front matter of the card is for the Hugging
Face Hub.
"""

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from coca_lit.cli.schema import part_of
from coca_lit.errors import DataError, UserError
from coca_lit.files import TEMPORARY, remove_leftovers
from coca_lit.models import CoCa, part_sizes
from coca_lit.models.poolers import AttentionalPooler
from coca_lit.models.registry import IMAGE_ENCODERS, POOLERS, TEXT_TOWERS
from coca_lit.models.text import TextTower
from coca_lit.reading import parse_json, printable, read_run_file, read_run_json, read_run_yaml
from coca_lit.runs.results import read_conditions
from coca_lit.runs.run_folder import commit
from coca_lit.runs.scores import cell, score_name
from coca_lit.tools.report.tables import Table, code, markdown, plain
from coca_lit.weights.load import save_model

CARD = "README.md"
TAG = "coca_lit"  # in the card's front matter
MARK, END = (
    "\n<!-- coca_lit export: ",
    " -->\n",
)  # of the last line of the card, a comment with the digests of all files
NEARLY_FULL = 2**16  # bytes that are left on a disk
WEIGHTS = "model.safetensors"
USAGE = """\
import coca_lit
from PIL import Image

model = coca_lit.load_model("{folder}/model.safetensors"{imports})
images = coca_lit.build_transform(**model.preprocessing)(Image.open("photo.jpg"))[None]
similarity = model.encode_image(images) @ model.encode_text(model.tokenizer(["a dog", "a cat"])).T
print(similarity)
"""
CAPTION = "print(model.tokenizer.decode(model.generate(images)[0]))\n"
TRAINING = ("seed", "image_size", "init_from", "init_parts", "lora", "ema", "model", "data", "trainer")
MAX_PICTURE = 16 * 2**20  # bytes
CLIP = "A CLIP: it embeds images and texts in a common space, for retrieval and zero-shot classification."
COCA = (
    "A Contrastive Captioner ([CoCa](https://arxiv.org/abs/2205.01917)): it embeds images and texts in a common"
    " space, for retrieval and zero-shot classification, and writes captions."
)


class Exported(NamedTuple):
    """The facts of a format for the card."""

    library: str  # that loads it, by the Hub's name
    files: dict[str, str]  # name -> description
    needs: str  # packages that `usage` needs
    usage: str  # Python code, with {folder} in place of the name of the folder
    check: str  # the comparison that was made, and its result
    limits: list[str]  # sentences, with {folder} too
    warning: str | None = None  # the first of the limits, which the command says as well


def write_safetensors(model: CoCa, folder: Path) -> Exported:
    """Weights and architecture in one file of ours, without the optimizer of a training checkpoint."""
    save_model(model, folder / WEIGHTS)
    parts = (
        (IMAGE_ENCODERS, model.config.image_encoder),
        (POOLERS, model.config.pooler),
        (TEXT_TOWERS, model.config.text_tower or ""),
    )
    guests = list(dict.fromkeys(part.partition(":")[0] for registry, part in parts if registry.is_guest(part)))
    usage = USAGE.replace("{imports}", f", imports={json.dumps(guests)}" if guests else "")
    return Exported(
        library="coca_lit",
        files={WEIGHTS: "weights in fp32; the architecture and a digest of both in the file's metadata"},
        needs=" and ".join(["coca_lit", *guests]),
        usage=usage + (CAPTION if model.decoder is not None else ""),
        check="The file holds the weights of the checkpoint as they are.",
        limits=[],
    )


def check_output(output: Path, checkpoints: Iterable[Path] = (), overwrite: bool = False) -> None:
    """Raises `ValueError` if the folder must not be written.

    Args:
        checkpoints: what is exported, those that are files.
        overwrite: replace an earlier export whose files are as they were written; nothing else is ever replaced.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"'{output}' is a file, but an export is a folder; choose another name")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"'{output}' is not empty; choose another folder, or set overwrite=true to replace an export")
    written = _digests(output)
    for path in sorted(output.iterdir()):
        if path.name == "__pycache__" and all(file.suffix == ".pyc" for file in path.iterdir()):
            continue  # of `captioner.py`
        if path.name not in written:
            raise ValueError(
                f"'{output}' has '{path.name}', which is not part of an export, so it is not replaced; choose another"
            )
        if _digest(path) != written[path.name]:
            raise ValueError(
                f"'{output}' has '{path.name}', which was changed since it was exported, so it is not replaced; choose "
                "another"
            )
    if any(checkpoint.resolve().is_relative_to(output.resolve()) for checkpoint in checkpoints):
        raise ValueError(f"'{output}' has the checkpoint itself, so it is not replaced; choose another folder")


def _digests(output: Path) -> dict[str, str]:
    """Name -> digest of the files of an export, from the last line of its card; nothing if it is no export."""
    path = output / CARD
    if not path.is_file():
        return {}
    _, _, last = path.read_text(encoding="utf-8", errors="replace").rpartition(MARK)
    try:
        return parse_json(last.removesuffix(END), str(path), dict)
    except DataError:
        return {}


def _digest(path: Path) -> str:
    """Of a file; of a card without its last line, which the digests are in."""
    if not path.is_file():
        return ""
    if path.name == CARD:
        return hashlib.sha256(path.read_bytes().rpartition(MARK.encode())[0]).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `output` at the end of the block and is removed on an error; if
    the process is killed, by the next export to `output`.

    Raises:
        DataError: nothing can be written there.
    """
    output = output.resolve()
    prefix = f"{output.name}.unfinished"
    unfinished = output.with_name(f".{prefix}.{os.getpid()}{TEMPORARY}")
    try:
        remove_leftovers(output.parent, glob.escape(prefix))
        unfinished.mkdir(parents=True)
        (unfinished / TEMPORARY).touch()
        yield unfinished
        (unfinished / TEMPORARY).unlink()
        for path in unfinished.iterdir():  # safetensors creates files that only their owner can read
            path.chmod(unfinished.stat().st_mode & 0o666)
        _replace(output, unfinished)
    except Exception as error:
        if _disk_full(error, output.parent):
            raise DataError(f"cannot write {output}: no space is left on the disk") from error
        if isinstance(error, OSError):
            raise DataError(f"cannot write {output}: {error.strerror or error}") from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone if all went well


def _disk_full(error: BaseException, folder: Path) -> bool:
    """Libraries say so by errors of their own types, onnx only by failing to parse the half file that it wrote."""
    known = os.path.isdir(folder)  # it may be what cannot be made
    if known and not isinstance(error, UserError) and shutil.disk_usage(folder).free < NEARLY_FULL:
        return True
    cause: BaseException | None = error
    while cause is not None and "No space left" not in str(cause):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _replace(output: Path, new: Path) -> None:
    old = output.with_name(f"{new.name}.old")
    if output.exists():
        output.rename(old)
    try:
        new.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


class Mixture(NamedTuple):
    """The weights are weight · one + (1 - weight) · other, as they were named."""

    one: str
    other: str
    weight: float


def write_card(
    folder: Path,
    name: str,
    model: CoCa,
    exported: Exported,
    checkpoint: Path | None = None,
    command: str | None = None,
    mixture: Mixture | None = None,
    repo: str | None = None,
) -> None:
    """Writes `README.md`. Scores, training and sample pictures come from the run folder in which the checkpoint lies.

    Args:
        checkpoint: None for a model that was in memory alone.
        command: that made the export.
        mixture: what the weights of the checkpoint were interpolated with.
        repo: where the folder is pushed to.
    """
    checkpoint = Path(os.path.abspath(checkpoint or folder / "model"))  # `last.ckpt` stays the link that it is
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    pictures = _copy_pictures(run, folder)
    files = exported.files | {picture: "captions of the run's evaluation" for picture in pictures}
    config = read_run_yaml(run, "config.yaml")
    summary = COCA if model.decoder is not None else CLIP
    if mixture is not None:
        summary += (
            f"\n\nIts weights are interpolated ([WiSE-FT](https://arxiv.org/abs/2109.01903)): {mixture.weight:g} times"
            f" `{mixture.one}` plus {1 - mixture.weight:g} times `{mixture.other}`."
        )
    code = _placed(exported.usage, name, repo)
    place = f" In the folder that holds `{name}`:" if code == _placed(exported.usage, name) else ""
    sections = [
        _front_matter(model, exported),
        f"# {name}\n\n{summary}",
        f"## Use\n\nNeeds {exported.needs}.{place}\n\n```python\n{code}```",
        *(["## Samples\n\n" + "\n\n".join(f"![{picture}]({picture})" for picture in pictures)] if pictures else []),
        _table("Files", ("file", "what it is"), ((f"`{file}`", what) for file, what in files.items())),
        _table("Architecture", ("", ""), _architecture(model).items()),
        _scores(run, config, checkpoint.name, mixture),
        _training(config, read_run_json(run, "environment.json")),
        "## Export\n\n"
        + (f"```bash\n{command}\n```\n\n" if command is not None else "")
        + (f"At commit {commit()}. " if commit() else "")
        + exported.check,
        _limits(exported, name, repo),
    ]
    text = "\n\n".join(sections) + "\n"
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != TEMPORARY}
    digests[CARD] = hashlib.sha256(text.encode()).hexdigest()
    (folder / CARD).write_text(f"{text}{MARK}{json.dumps(digests)}{END}", encoding="utf-8")


def _copy_pictures(run: Path, folder: Path) -> list[str]:
    """The sheets of sample captions that the evaluations of a run drew, under their names in the export."""
    if not (run / "results.json").is_file():  # some other folder
        return []
    names = sorted(sheet.name for sheet in (run / "samples").glob("*.png") if re.fullmatch(r"[\w.-]+", sheet.name))
    for name in names:
        (folder / f"samples_{name}").write_bytes(read_run_file(run, f"samples/{name}", MAX_PICTURE))
    return [f"samples_{name}" for name in names]


def _placed(text: str, name: str, repo: str | None = None) -> str:
    """A text of `Exported` with the name of the folder. OpenCLIP and coca_lit also take the name of a repository in
    place of a folder or its weights; onnxruntime does not.
    """
    if repo is not None:
        text = re.sub(r'"(local-dir:\{folder\}|\{folder\}/\w+\.safetensors)"', f'"hf-hub:{repo}"', text)
    return text.replace("{folder}", name)


def _front_matter(model: CoCa, exported: Exported) -> str:
    tasks = ["image-to-text"] if model.decoder is not None else []
    tags = dict.fromkeys([TAG, "coca" if tasks else "clip", *tasks, "zero-shot-image-classification", exported.library])
    content = {
        "library_name": exported.library,
        "pipeline_tag": "image-to-text" if tasks else "zero-shot-image-classification",
        "tags": list(tags),
    }
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _architecture(model: CoCa) -> dict[str, Any]:
    config = model.config
    other = "words" if isinstance(config.tokenizer, list) else "tokens of a tokenizer.json"
    words = {"clip": "CLIP's byte pairs", "r50k": "byte pairs of GPT-2"}.get(str(config.tokenizer), other)
    decoder = f"{config.decoder_layers} layers of width {config.text_width}, {config.text_heads} heads"
    pooler = config.pooler.rpartition(":")[2]
    if any(isinstance(part, AttentionalPooler) for part in model.pooling.modules()):
        pooler += f", {config.pooler_queries} queries, {config.pooler_heads} heads"
    arguments = ", ".join(f"{key}={value}" for key, value in (config.image_encoder_args or {}).items())
    spec = config.image_encoder
    module, _, encoder = spec.rpartition(":") if spec in IMAGE_ENCODERS else ("", "", spec)
    return {
        "image encoder": f"`{encoder}` of {f'`{module}`' if module else 'timm'}"
        + (f" with {arguments}" if arguments else ""),
        "image size": f"{config.image_size} pixels",
        "pooler": pooler,
        "common space": f"{config.embed_dim} dimensions",
        "text tower": f"{config.text_layers} layers of width {config.text_width}, {config.text_heads} heads",
        "decoder": decoder if model.decoder is not None else "none",
        "tokenizer": f"{model.tokenizer.vocab_size:,} {words}, {config.context_length} tokens of context",
        **({"CLS mask": config.cls_mask} if isinstance(model.text, TextTower) else {}),
        **{f"parameters, {part}": f"{size:,}" for part, size in part_sizes(model).items()},
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }


def _scores(run: Path, config: Mapping[str, Any], checkpoint: str, mixture: Mixture | None) -> str:
    results = read_run_json(run, "results.json")
    if not results:
        return "## Scores\n\nUnknown: there was no `results.json` of a run next to the checkpoint."
    wrong = [name for name, value in results.items() if type(value) not in (int, float)]
    if wrong:
        raise DataError(f"{run}/results.json holds no number as the score {printable(wrong[0])}")
    data = list(dict.fromkeys(key.rpartition("/")[0] for key in results))
    scores = dict.fromkeys(key.rpartition("/")[2] for key in results)
    images = {score: of.images for score, of in read_conditions(run).items()}
    keys = {s: [f"{name}/{s}" for name in data] for s in scores}
    rows = [[plain(score_name(s)), *(cell(s, results.get(key), images.get(key)) for key in keys[s])] for s in scores]
    note = [f"At the end of the run; `{checkpoint}` may be from another step."] if checkpoint != "last.ckpt" else []
    if mixture is not None:
        note.append(f"They are scores of `{checkpoint}` before interpolation; this model was not scored.")
    split = part_of(config, "scoring").get("split")
    if split:
        note.append(f"On the split {code(str(split))} of data with several splits.")
    return _table("Scores", ("", *map(plain, data)), rows, " ".join(note))


def _training(config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    if not config:
        return "## Training\n\nUnknown: there was no `config.yaml` of a run next to the checkpoint."
    data = part_of(config, "data")
    source = str(data.get("_target_", "unknown")).rpartition(".")[2]
    where = next((str(data[key]) for key in ("shards", "root", "name") if key in data), None)
    settings = yaml.safe_dump({key: config[key] for key in TRAINING if key in config}, sort_keys=False)
    facts = {key: environment[key] for key in ("commit", "machine", "seconds", "torch") if environment.get(key)}
    lines = [f"Data: {code(source)}" + (f", {code(where)}." if where else ".")]
    if environment.get("command"):
        lines += ["", _fenced("bash", f"{printable(str(environment['command']))}\n")]
    lines += ["", ", ".join(f"{key}: {plain(str(value))}" for key, value in facts.items())] if facts else []
    lines += ["", f"<details><summary>Configuration</summary>\n\n{_fenced('yaml', settings)}\n\n</details>"]
    return "## Training\n\n" + "\n".join(lines)


def _fenced(language: str, lines: str) -> str:
    """A block of code, which no backticks in it can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
    return f"{fence}{language}\n{lines}{fence}"


def _limits(exported: Exported, name: str, repo: str | None) -> str:
    limits = [
        *([exported.warning] if exported.warning else []),
        "The licence of the weights is not stated: it depends on the training data, and on the initial weights."
        " Add `license:` to the front matter once it is known.",
        "The model reproduces errors and biases of its training data; the scores above are all that is known of its"
        " quality.",
        *(_placed(limit, name, repo) for limit in exported.limits),
    ]
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _table(title: str, header: Sequence[str], rows: Iterable[Iterable[Any]], note: str = "") -> str:
    """The cells are Markdown."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    return "\n\n".join([f"## {title}", markdown(Table(title, header, cells)), *([note] if note else [])])
