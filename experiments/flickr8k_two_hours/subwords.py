"""Byte pairs of the training captions in place of words, as an override of `model.net.tokenizer`:
`python -m experiments.flickr8k_two_hours.subwords FLICKR8K_FOLDER [SIZE]`.
"""

import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from coca_lit.data.datasets.captions import flickr_training_captions
from coca_lit.tokenizer import pack

SPECIAL = {"start": "<start>", "end": "<end>", "pad": "<pad>"}


def subwords(root: str | Path, size: int = 2920) -> dict[str, str]:
    """A `tokenizer.json` for `get_tokenizer`, of as many tokens as Flickr8k has words that occur four times."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIAL.values()], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(flickr_training_captions(root), trainer)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(str(file := Path(folder) / "tokenizer.json"))
        return {"packed": pack(file), **SPECIAL}


if __name__ == "__main__":
    spec = subwords(sys.argv[1], *map(int, sys.argv[2:]))
    print("{" + ", ".join(f"{key}: '{value}'" for key, value in spec.items()) + "}")
