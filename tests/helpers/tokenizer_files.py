"""Tokenizer files of several families, and texts of many scripts."""

import random
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SCRIPTS = ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x620, 0x64A))
SCRIPTS += ((0x905, 0x939), (0xE01, 0xE30), (0x3041, 0x3096), (0x4E00, 0x4FFF), (0xAC00, 0xADFF), (0x1F300, 0x1F5FF))
SPECIAL = {"start": "<s>", "end": "</s>", "pad": "<pad>"}


def texts_of_many_scripts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)

    def word() -> str:
        first, last = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6))) + rng.choice(("", "", ",", "."))

    return [" ".join(word() for _ in range(rng.randint(0, 9))) for _ in range(count)]


def trained_file(kind: str, folder: Path) -> Path:
    """A `tokenizer.json` of each family, trained on texts of many scripts."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "ByteLevel":
        source = HFTokenizer(models.BPE())
        source.pre_tokenizer, source.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        source.normalizer = normalizers.NFC()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "Metaspace":
        source = HFTokenizer(models.Unigram())
        source.pre_tokenizer, source.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        source.normalizer = normalizers.NFKC()
        trainer = trainers.UnigramTrainer(vocab_size=3000, special_tokens=special, unk_token="<unk>")
    else:
        source = HFTokenizer(models.WordPiece(unk_token="<unk>"))
        source.pre_tokenizer, source.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
        source.normalizer = normalizers.BertNormalizer(lowercase=True)
        trainer = trainers.WordPieceTrainer(vocab_size=3000, special_tokens=special)
    source.train_from_iterator(texts_of_many_scripts(2000, seed=1), trainer)
    source.enable_truncation(5)  # as many files ask for
    source.enable_padding()
    source.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
