"""`coca-data score`, `filter` and `dedup`: choosing samples of shards without copying them; `coca-data teach`: what
teachers say of them.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coca_lit.tools.curate.choose import Chosen
    from coca_lit.tools.curate.judge import JudgedShard

    Commands = argparse._SubParsersAction["Words"]

SCORE = """\
Scores each pair of a set of shards with a model: similarity of the embeddings, likelihood of the caption per token, and
what needs no model: length of the caption, size of the image, perceptual hash. Writes NAME.scores.parquet beside each
NAME.tar. An interrupted command resumes at the shard where it stopped."""
FILTER = """\
Selects samples by their scores, and writes their keys for data.selection: where="similarity > 0.2 AND words > 2" keeps
those for which a condition holds, top=0.3 by=similarity the best of these. Both take any formula in SQL; columns:
shard, key, similarity, likelihood, words, characters, width, height, aspect, phash, language."""
DEDUP = """\
Selects samples no two of which are near-duplicates, and writes their keys for data.selection. Near-duplicates have the
same perceptual hash (hash-distance=0), similar ones (hash-distance=3), or similar embeddings (cosine=0.95, after
score --embeddings). The one with the most of `best` stays. against=FOLDER removes near-duplicates of other sets, too:
of earlier data, or of the images of an evaluation."""
TEACH = """\
Embeds several crops and all captions of each sample with one or more teachers, for model.objectives: Distillation.
Writes NAME.teachers.safetensors beside each NAME.tar; data.teachers=FOLDER reads them and replays the crops. An
interrupted command resumes at the shard where it stopped."""
_SCORES = "folders of NAME.scores.parquet, or such files"


class Words(argparse.ArgumentParser):
    """Takes KEY=VALUE for --key VALUE, and ~/ in VALUE for the home, as the other commands do."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = []
        for word in args or ():
            key, equals, value = word.partition("=")
            flag = f"--{key.replace('_', '-')}"
            value = os.path.expanduser(value) if value.startswith("~/") else value
            words.append(f"{flag}={value}" if equals and flag in self._option_string_actions else word)
        return super().parse_known_args(words, namespace)


def print_faults(name: str, bad: Mapping[str, int], examples: Sequence[str]) -> None:
    """A line about the bad samples of a shard, if there are any."""
    from coca_lit.reading import printable

    if bad:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in bad.items())
        print(printable(f"{name}: {reasons} ({'; '.join(examples)})"))


def add_score(commands: "Commands", engine: str) -> None:
    parser = commands.add_parser("score", help="score every pair with a model", description=SCORE, epilog=engine)
    parser.add_argument("shards", nargs="+", help="folders, 'FOLDER/{00000..00099}.tar', 'FOLDER/*.tar'")
    parser.add_argument("--checkpoint", help="a file, run folder, export, hf-hub:ORG/REPO or released name, CLIPs too")
    parser.add_argument("--output", type=Path, help="folder for the scores (default: beside each shard)")
    parser.add_argument("--caption-key", default="txt", help="field of the samples' JSON that holds the caption")
    parser.add_argument("--embeddings", action="store_true", help="keep the image embeddings, for dedup cosine=…")
    parser.add_argument("--language", action="store_true", help="identify the language of the captions")
    _add_computation(parser, 64)

    def run(options: argparse.Namespace) -> None:
        from coca_lit.tools.checkpoint import chosen_checkpoint
        from coca_lit.tools.curate.judge import Judgement, claim_outputs, judge_shard

        checkpoint = chosen_checkpoint(options.checkpoint, offline=False)  # the small model is no judge of data
        asked = options.output, options.caption_key, options.embeddings, options.language
        judgement = Judgement(checkpoint, *asked, *_computation(options))
        _of_all_shards(options, "scoring", "scores", judge_shard, claim_outputs, judgement)

    parser.set_defaults(run=run, engine=[])


def add_teach(commands: "Commands", engine: str) -> None:
    parser = commands.add_parser(
        "teach", help="embed crops and captions for distillation", description=TEACH, epilog=engine
    )
    parser.add_argument("shards", nargs="+", help="folders, 'FOLDER/{00000..00099}.tar', 'FOLDER/*.tar'")
    parser.add_argument(
        "--teachers", nargs="+", action="extend", required=True, help="checkpoints as of score, CLIPs too"
    )
    parser.add_argument("--output", type=Path, help="folder for the embeddings (default: beside each shard)")
    parser.add_argument("--caption-keys", nargs="+", action="extend", help="fields with captions (default: the .txt)")
    parser.add_argument("--views", type=positive, default=4, help="crops of each image (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the crops (default: %(default)s)")
    _add_computation(parser, 32)

    def run(options: argparse.Namespace) -> None:
        from coca_lit.tools.checkpoint import chosen_checkpoint
        from coca_lit.tools.curate.teach import Teaching, claim_outputs, teach_shard

        teachers = tuple(chosen_checkpoint(name, offline=False) for name in options.teachers)
        asked = options.output, tuple(options.caption_keys or ["txt"]), options.views, options.seed
        teaching = Teaching(teachers, *asked, *_computation(options))
        _of_all_shards(options, "teaching", "embeddings", teach_shard, claim_outputs, teaching)

    parser.set_defaults(run=run, engine=[])


def _of_all_shards(
    options: argparse.Namespace,
    doing: str,
    what: str,
    function: "Callable[[Path, Any], JudgedShard]",
    claim_outputs: Callable[[Sequence[Path], Any], None],
    settings: Any,
) -> None:
    """Runs a function of a shard and settings on the chosen engine, and prints what became of the samples."""
    from coca_lit.data.shards.listing import local_shards
    from coca_lit.tools.clusters.engines import Work, engine_from
    from coca_lit.tools.curate.scores import check_shards

    paths = local_shards(options.shards)
    check_shards(paths, options.output)
    engine = engine_from(options.engine)
    claim_outputs(paths, settings)
    work = Work(engine, doing)
    shards = sorted(work(function, paths, settings))
    for shard in shards:
        print_faults(str(shard.path), shard.bad, shard.examples)
    good, bad = sum(shard.samples for shard in shards), sum(sum(shard.bad.values()) for shard in shards)
    print(f"{good:,} samples have {what}, {bad:,} bad ones are left out")
    work.close(len(paths), found=sum(shard.skipped for shard in shards))


def _computation(options: argparse.Namespace) -> tuple[int, int, bool]:
    """Batch size, processes that decode, and whether models compute in bf16."""
    import torch

    from coca_lit.cli.runtime import chosen_dtype, configure_libraries
    from coca_lit.tools.caption.command import decoders

    configure_libraries(None)
    return options.batch_size, decoders(options.num_workers), chosen_dtype(options.precision) is torch.bfloat16


def _add_computation(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="default: %(default)s")
    parser.add_argument(
        "--num-workers", type=int, help="processes that decode images (default: up to 4; none on macOS and Windows)"
    )
    parser.add_argument("--precision", default="auto", help="fp32, bf16, or auto: bf16 where the device computes it")


def add_filter(commands: "Commands") -> None:
    parser = commands.add_parser("filter", help="select samples by their scores", description=FILTER)
    _add_choice(parser)
    parser.add_argument("--where", default="true", help="a condition in SQL over the columns of the scores")
    parser.add_argument("--top", type=float, help="share of the samples that is kept, with --by")
    parser.add_argument("--by", help="a column, or a formula in SQL: what the best ones have most of")

    def run(options: argparse.Namespace) -> None:
        from coca_lit.tools.curate.choose import filter_scores

        _choose(options, filter_scores, where=options.where, top=options.top, by=options.by)

    parser.set_defaults(run=run)


def add_dedup(commands: "Commands") -> None:
    parser = commands.add_parser("dedup", help="select samples without near-duplicates", description=DEDUP)
    _add_choice(parser)
    parser.add_argument("--against", nargs="+", action="extend", default=[], help=f"of other sets: {_SCORES}")
    parser.add_argument("--hash-distance", type=_bits, default=0, help="bits of 64, or none (default: %(default)s)")
    parser.add_argument("--cosine", type=float, help="of image embeddings, from which on images are near-duplicates")
    parser.add_argument("--best", default="similarity", help="a column or a formula (default: %(default)s)")

    def run(options: argparse.Namespace) -> None:
        from coca_lit.tools.curate.choose import dedup_scores
        from coca_lit.tools.curate.scores import find_scores

        against = find_scores(options.against)
        limits = {"hash_distance": options.hash_distance, "cosine": options.cosine, "best": options.best}
        _choose(options, dedup_scores, against=against, **limits)

    parser.set_defaults(run=run)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scores", nargs="+", help=_SCORES)
    parser.add_argument("--output", type=Path, required=True, help="NAME.parquet, for data.selection")
    parser.add_argument("--selection", type=Path, help="of an earlier choice: only its samples are considered")
    parser.add_argument("--memory-gb", type=float, help="that DuckDB may take (default: most of what there is)")


def _choose(options: argparse.Namespace, function: "Callable[..., Chosen]", **choice: object) -> None:
    from coca_lit.tools.curate.scores import find_scores

    chosen = function(
        find_scores(options.scores),
        options.output,
        selection=options.selection,
        memory_gb=options.memory_gb,
        **choice,
    )
    for key, value in chosen.how.items():
        if value:
            print(f"{key}: {value}")
    share = chosen.kept / max(chosen.total, 1)
    print(f"wrote {options.output}: {chosen.kept:,} of {chosen.total:,} samples ({share:.1%})")


def _bits(text: str) -> int | None:
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of bits or none, not {text!r}")
    return None if text == "none" else int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)
