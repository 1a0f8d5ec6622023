"""`coca-data teach`: what teachers say of the samples of shards."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from coca_lit.tools.prepare.subcommand import (
    SHARDS,
    add_computation,
    annotate,
    computation,
    data_parser,
    positive,
    run_subcommand,
)

TEACH = """\
Embeds several crops and all captions of each sample with one or more teachers, for model.objectives: Distillation.
Writes NAME.teachers.safetensors beside each NAME.tar; data.teachers=FOLDER reads them and replays the crops. An
interrupted command resumes at the shard where it stopped."""
CHECKPOINTS = "files, run folders, exports, hf-hub:ORG/REPO or released names, CLIPs too"


def teach(words: Sequence[str]) -> None:
    """Runs `coca-data teach …`."""
    commands, subcommands = data_parser()
    parser = subcommands.add_parser("teach", description=TEACH)
    parser.add_argument("shards", nargs="+", help=SHARDS)
    parser.add_argument("--teachers", nargs="+", action="extend", required=True, help=CHECKPOINTS)
    parser.add_argument("--output", type=Path, help="folder for the embeddings (default: beside each shard)")
    parser.add_argument("--caption-keys", nargs="+", action="extend", help="fields with captions (default: the .txt)")
    parser.add_argument("--views", type=positive, default=4, help="crops of each image (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the crops (default: %(default)s)")
    add_computation(parser, batch_size=32)
    parser.add_engine()
    parser.set_defaults(run=_teach)
    run_subcommand(commands, words)


def _teach(options: argparse.Namespace) -> None:
    from coca_lit.projects.distillation.teach import Teaching, claim_outputs, teach_shard
    from coca_lit.tools.checkpoint import chosen_checkpoint

    batch_size, num_workers, bf16 = computation(options)
    teaching = Teaching(
        teachers=tuple(chosen_checkpoint(name, offline=False) for name in options.teachers),
        output=options.output,
        caption_keys=tuple(options.caption_keys or ["txt"]),
        views=options.views,
        seed=options.seed,
        batch_size=batch_size,
        num_workers=num_workers,
        bf16=bf16,
    )
    annotate(options, "teaching", "embeddings", teach_shard, claim_outputs, teaching)
