"""How the well-known image-text sets of the web become shards: `coca-data recipe NAME`.

The sets are lists of URLs, and img2dataset is the tool that fetches them; the flags are those of its version 1.47,
which runs on Python up to 3.12. Images keep their shape and have at most 256 pixels on the shorter side, from which 224
are cropped. Neighbours in a list stay neighbours in the shards: one that is sorted is best shuffled first.
"""

from typing import NamedTuple

_FETCH = """\
pip install img2dataset        # in an environment of its own, with Python 3.12 or older
img2dataset --url_list {urls} --input_format {format} --url_col {url} --caption_col {caption} \\
    --output_format webdataset --output_folder {name} --number_sample_per_shard 10000 \\
    --image_size 256 --resize_mode keep_ratio --resize_only_if_bigger True \\
    --processes_count 16 --thread_count 64 --compute_hash sha256 --incremental_mode incremental{more}
coca-data check {name}
python train.py experiment=pretrain_b32 data.shards={name} data.epoch_samples=null"""


class Recipe(NamedTuple):
    """A set of the web."""

    notes: str  # what it is and where its list of URLs comes from
    urls: str  # file or folder of that list
    format: str
    url: str
    caption: str
    more: str = ""  # further flags

    def commands(self, name: str) -> str:
        lines = [f"# {line}" for line in self.notes.splitlines()]
        return "\n".join([*lines, _FETCH.format(name=name, **self._asdict())])


RECIPES = {
    "laion2b": Recipe(
        "LAION-2B-en, 2.3 billion pairs; the original lists were withdrawn in December 2023. For who has them: fetch\n"
        "only what is also in Re-LAION (see: coca-data recipe relaion).",
        urls="laion2B-en-joined",
        format="parquet",
        url="URL",
        caption="TEXT",
        more=""" \\
    --save_additional_columns '["similarity","hash","punsafe","pwatermark"]' --oom_shard_count 6""",
    ),
    "relaion": Recipe(
        "Re-LAION-2B-en-research-safe, 2.1 billion pairs, the cleaned release of 2024 (gated: accept its terms):\n"
        "    hf download laion/relaion2B-en-research-safe --repo-type dataset --local-dir relaion-urls\n"
        "Its columns are url and caption; those of LAION's older lists are URL and TEXT.",
        urls="relaion-urls",
        format="parquet",
        url="url",
        caption="caption",
        more=" --oom_shard_count 6",
    ),
    "datacomp": Recipe(
        "DataComp-1B, 1.4 billion pairs, faces blurred where the list gives boxes:\n"
        "    hf download mlfoundations/datacomp_1b --repo-type dataset --local-dir datacomp-urls\n"
        "verify_hash drops what has changed since the list was made. DataComp's own script keeps 512 pixels on the\n"
        "longer side and verifies nothing: --image_size 512 --resize_mode keep_ratio_largest, for comparisons with it.",
        urls="datacomp-urls",
        format="parquet",
        url="url",
        caption="text",
        more=""" \\
    --bbox_col face_bboxes --verify_hash '["sha256","sha256"]' \\
    --save_additional_columns '["uid"]' --oom_shard_count 6""",
    ),
    "cc3m": Recipe(
        "Conceptual Captions, 3.3 million pairs. Train_GCC-training.tsv of its project page, with a head line:\n"
        "    sed '1i caption\\turl' Train_GCC-training.tsv > cc3m.tsv",
        urls="cc3m.tsv",
        format="tsv",
        url="url",
        caption="caption",
    ),
    "cc12m": Recipe(
        "Conceptual 12M. cc12m.tsv of the repository google-research-datasets/conceptual-12m, with a head line:\n"
        "    sed -i '1i url\\tcaption' cc12m.tsv",
        urls="cc12m.tsv",
        format="tsv",
        url="url",
        caption="caption",
    ),
}
