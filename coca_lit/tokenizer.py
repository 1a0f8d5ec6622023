"""Texts to token ids and back: the byte-pair encodings of CLIP and GPT-2, one id per word of a closed vocabulary, or
any `tokenizer.json` of the `tokenizers` library.

The tokenizer is the one place that knows vocabulary size, context length and special ids; the model reads them from
here. Text is never parsed for special tokens: a caption that contains "<end_of_text>" is encoded as these characters.
"""

import base64
import gzip
import html
import json
import logging
import re
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ftfy
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from coca_lit.errors import DataError, check_number
from coca_lit.reading import MAX_JSON, read_bounded

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
CLIP_MERGES = ASSETS / "clip_merges.txt.gz"
GPT2_MERGES = ASSETS / "gpt2_merges.txt.gz"
if TYPE_CHECKING:
    from torch import Tensor

CONTEXT_LENGTH = 76  # tokens of a text; OpenCLIP's CoCa has 77 positions, the last of which is its CLS token's
_DECODERS = ("ByteLevel", "Metaspace", "ByteFallback", "WordPiece", "BPEDecoder")
MAX_PACKED = 3 * 2**20  # bytes of a packed tokenizer.json; files of weights describe a model in at most 4 MiB
# Of `WordTokenizer`: letters and digits with their combining marks, and joiners within, as many scripts of India have.
_RUN = r"[\p{L}\p{N}](?:[\u200c\u200d]?[\p{L}\p{M}\p{N}])*"
_WORDS = pre_tokenizers.Split(Regex(f"{_RUN}(?:['’-]{_RUN})*"), behavior="removed", invert=True)
# CLIP splits text into English contractions (also with a long s), runs of letters, single digits and runs of others.
# It ignores case, so that U+0345, a mark whose capital is the letter iota, is in none of these, and is left out. Only
# characters that newer versions of Unicode added may count otherwise than in OpenCLIP's package `regex`.
CLIP_SPLIT = "'[s\u017f]|" r"'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{345}]+"


Spec = str | list[str] | dict[str, str]


class Tokenizer(ABC):
    """Common part of all tokenizers: special ids, padding and truncation."""

    spec: Spec  # what `get_tokenizer` needs to build it again: a name, the list of words, or a packed file
    pad_id: int
    sot_id: int
    eot_id: int
    unk_id: int | None = None  # of words that a closed vocabulary lacks
    vocab_size: int
    token_bytes: list[bytes]  # of each id; joined for the ids of a text, they are the text in UTF-8
    open_clip_version: ClassVar[str | None] = None  # the first version of OpenCLIP that has it
    open_clip_config: ClassVar[dict[str, Any]] = {}  # its keys in OpenCLIP's `text_cfg`

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        if context_length < 3:
            raise ValueError(f"context_length must be at least 3 (start, one token, end), got {context_length}")
        self.context_length = context_length

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with start and end; a text that is too long is cut and still ends with the end id."""
        room = self.context_length - 2
        return [[self.sot_id, *ids[:room], self.eot_id] for ids in self._encode_batch(texts)]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of ids of each text, start and end included, if it were not cut."""
        return [len(ids) + 2 for ids in self._encode_batch(texts)]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_answer(self, question: str, answer: str) -> tuple[list[int], int]:
        """Ids of a question and its answer as one text, and how many of them, start included, are the question's.

        A pair that is too long loses the end of the question; an answer gets at most half of the context.
        """
        answered = self.encode(answer)[1:]
        if len(answered) > self.context_length // 2:
            answered = [*answered[: self.context_length // 2 - 1], self.eot_id]
        asked = self.encode(question)[:-1][: self.context_length - len(answered)]
        return [*asked, *answered], len(asked)

    def __call__(self, texts: str | Sequence[str]) -> "Tensor":
        """Token ids (B, context_length), int64, padded with `pad_id`."""
        return self.tokens_of([texts] if isinstance(texts, str) else texts)

    def tokens_of(self, texts: Sequence[str]) -> "Tensor":
        """As a call, but without a warning for words that the vocabulary lacks: for texts of data sets."""
        import torch  # here: the arguments of a model are checked without it

        rows = self.encode_batch(list(texts))
        tokens = torch.full((len(rows), self.context_length), self.pad_id, dtype=torch.long)  # (B, L)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def decode(self, ids: "Iterable[int] | Tensor") -> str:
        """Text up to the first end id, without the start id. Ids equal to `pad_id` before the end are real tokens."""
        rest: list[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if self.eot_id in rest:
            rest = rest[: rest.index(self.eot_id)]
        else:  # no end: trailing pads are padding
            while rest and rest[-1] == self.pad_id:
                rest.pop()
        return b"".join(self.token_bytes[i] for i in rest).decode("utf-8", errors="replace").strip()


class CLIPTokenizer(Tokenizer):
    """OpenAI CLIP's lower-case byte-pair encoding, id for id: 49,408 tokens, start 49406, end 49407.

    The pad id is 0 as in OpenCLIP, although 0 is also the token "!" inside a run of punctuation ("!#$" -> [0, 2,
    259]); everything in this package therefore works with text lengths and never compares ids with 0 to find padding.
    """

    spec = "clip"
    pad_id = 0
    open_clip_version = "3.3"

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        super().__init__(context_length)
        merges = _read_merges(CLIP_MERGES)
        byte_of = _byte_of_symbol()
        symbols = list(byte_of)
        tokens = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
        self.sot_id = len(tokens)
        self.eot_id = len(tokens) + 1
        self.vocab_size = len(tokens) + 2
        vocabulary = {token: i for i, token in enumerate(tokens)}
        self.bpe = HFTokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self.token_bytes = [*(_token_bytes(token, byte_of) for token in tokens), b"", b""]

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        cleaned = [clean_whitespace(text).lower() for text in texts]  # the library gets a final Greek sigma wrong
        return [encoding.ids for encoding in self.bpe.encode_batch_fast(cleaned)]


class R50kTokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, tiktoken's r50k_base, as OpenCLIP 4 uses it: 50,260 tokens with end 50257, pad 50258
    and start 50259. Case is kept. GPT-2's own end of text, 50256, is in no text.
    """

    spec = "r50k"
    open_clip_version = "4"
    open_clip_config: ClassVar[dict[str, Any]] = {
        "pad_id": 50258,
        "bos_id": 50259,
        "eos_id": 50257,
        "tokenizer_type": "tiktoken",
        "tiktoken_name": "r50k_base",
        "tokenizer_kwargs": {"clean": "whitespace"},
    }
    eot_id = 50257
    pad_id = 50258
    sot_id = 50259
    vocab_size = 50260

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        super().__init__(context_length)
        merges = _read_merges(GPT2_MERGES)
        byte_of = _byte_of_symbol()
        tokens = [*byte_of, *map("".join, merges)]
        self.bpe = HFTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        self.bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits as GPT-2 does
        special = self.vocab_size - len(tokens)
        self.token_bytes = [*(_token_bytes(token, byte_of) for token in tokens), *[b""] * special]

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.bpe.encode_batch_fast([clean_whitespace(text) for text in texts])]


class WordTokenizer(Tokenizer):
    """One id per word of a given vocabulary, for short captions in a closed vocabulary, such as the built-in scenes.

    Words are runs of letters and digits, their marks, and inner apostrophes or hyphens, lower-cased; any other
    word becomes the unknown id, which decodes to nothing. A call warns of such words, of each once.

    Raises:
        ValueError: a word is listed twice, or is not one that is read.
    """

    pad_id = 0
    sot_id = 1
    eot_id = 2
    unk_id = 3

    def __init__(self, words: Sequence[str], context_length: int = CONTEXT_LENGTH) -> None:
        super().__init__(context_length)
        if len(set(words)) != len(words):
            raise ValueError("the vocabulary lists a word twice")
        unread = [word for word in words if not isinstance(word, str) or split_words(word) != [word]]
        if unread:
            raise ValueError(f"the vocabulary has {unread[0]!r}, which is not read as one word in lower case")
        self.spec: list[str] = list(words)
        self._ids = {word: i for i, word in enumerate(words, start=4)}
        self._named: set[str] = set()  # unknown words that a warning has named
        self.vocab_size = 4 + len(words)
        self.token_bytes = [b""] * 4 + [f"{word} ".encode() for word in words]

    def __call__(self, texts: str | Sequence[str]) -> "Tensor":
        self.warn_of_unknown([texts] if isinstance(texts, str) else texts)
        return super().__call__(texts)

    def warn_of_unknown(self, texts: Sequence[str]) -> None:
        """Names the words that the vocabulary lacks, each once."""
        words = split_words(" ".join(texts))
        new = [word for word in dict.fromkeys(words) if word not in self._ids and word not in self._named]
        if new:
            self._named.update(new)
            more = f" and {len(new) - 10:,} more" if len(new) > 10 else ""
            named = ", ".join(map(repr, new[:10]))
            log.warning("the model does not know %s%s: to it, all unknown words are the same", named, more)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self._ids.get(word, self.unk_id) for word in split_words(text)] for text in texts]


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library, with its own cleaning, id for id.

    Args:
        packed: the file, see `pack`.
        start, end, pad: its tokens for these, which no text contains: a text with "<s>" is encoded as these characters.

    Raises:
        ValueError: this is no such file, it lacks a special token, its decoder is not one of `_DECODERS`, or its end
            stands for unknown words too.
    """

    def __init__(self, packed: str, start: str, end: str, pad: str, context_length: int = CONTEXT_LENGTH) -> None:
        super().__init__(context_length)
        self.spec = {"packed": packed, "start": start, "end": end, "pad": pad}
        try:
            described = json.loads(_unpacked(packed))
            special = {token["content"] for token in described.get("added_tokens", ()) if token["special"]}
            hidden = {token: f"\ue000{i}\ue001coca_lit" for i, token in enumerate(sorted({*special, start, end, pad}))}
            self.bpe = HFTokenizer.from_str(json.dumps(_renamed(described, hidden)))
        except Exception as error:  # the library raises plain exceptions
            raise ValueError(f"this is not a tokenizer.json: {error}") from error
        self.bpe.no_padding()
        self.bpe.no_truncation()
        self.bpe.encode_special_tokens = True
        shown = {name: token for token, name in hidden.items()}
        ids = {shown.get(name, name): i for name, i in self.bpe.get_vocab(with_added_tokens=True).items()}
        missing = [token for token in (start, end, pad) if token not in ids]
        if missing:
            raise ValueError(f"the tokenizer has no token {missing[0]!r}")
        if len({start, end, pad}) < 3:
            raise ValueError(f"start, end and pad must be three tokens, got {start!r}, {end!r} and {pad!r}")
        self.sot_id = ids[start]
        self.eot_id = ids[end]
        self.pad_id = ids[pad]
        model = described["model"]
        self.unk_id = model.get("unk_id", ids.get(model.get("unk_token")))
        if self.unk_id == self.eot_id:  # as in CLIP's files, whose byte pairs know every text
            every_byte = "".join(map(chr, [*range(0x801), *range(0x1000, 0x110000, 0x1000)]))
            if self.unk_id in self.bpe.encode(every_byte).ids:
                raise ValueError(f"the tokenizer's token for unknown words is {end!r}: name another token as end")
            self.unk_id = None
        self.vocab_size = max(ids.values()) + 1
        read = _reader(described.get("decoder") or {}, model.get("end_of_word_suffix") or "")
        self.token_bytes = [b""] * self.vocab_size
        for token, i in ids.items():
            if token not in hidden and i != self.unk_id:
                self.token_bytes[i] = read(token)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.bpe.encode_batch_fast(list(texts), add_special_tokens=False)]


def is_same(spec: Spec, other: Spec) -> bool:
    """Whether they describe one tokenizer; another version of zlib may have packed its file in another way."""
    return _without_packing(spec) == _without_packing(other)


def _without_packing(spec: Spec) -> Spec:
    return {**spec, "packed": _unpacked(spec["packed"])} if isinstance(spec, Mapping) else spec


def _unpacked(packed: str) -> str:
    return zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), MAX_JSON).decode()


def pack(file: Path) -> str:
    """A `tokenizer.json` as a checkpoint stores it: compressed, in base64; raises `DataError` if it cannot be read, or
    takes more than `MAX_PACKED` bytes then.
    """
    content = read_bounded(file, MAX_JSON, "is not a readable tokenizer.json")
    packed = base64.b64encode(zlib.compress(content, 9)).decode()
    if len(packed) > MAX_PACKED:
        raise DataError(
            f"{file} takes {len(packed):,} bytes in a checkpoint, where {MAX_PACKED:,} are read: take a smaller one"
        )
    return packed


def _renamed(described: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A `tokenizer.json` with other names of its special tokens, which no text has. The models of the library know
    special tokens as they know words: a Unigram, for one, finds "</s>" in a text.
    """
    model = dict(described["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # of a Unigram: (token, score)
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    else:
        model["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if not {"".join(pair), *pair} & names.keys()]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    added = [
        token | {"content": names.get(token["content"], token["content"])}
        for token in described.get("added_tokens", ())
    ]
    # What goes around a text, and how tokens are joined, is ours.
    return {**described, "model": model, "added_tokens": added, "post_processor": None, "decoder": None}


def _reader(decoder: Mapping[str, Any], end_of_word: str) -> Callable[[str], bytes]:
    """What turns a token of a file into the bytes that it stands for; a blank follows the end of a word."""
    kinds = {part.get("type") for part in (decoder, *decoder.get("decoders", []))}
    byte_of = _byte_of_symbol()
    if "ByteLevel" in kinds:
        return lambda token: _token_bytes(token, byte_of, end_of_word)
    if kinds & {"Metaspace", "ByteFallback"}:  # SentencePiece's
        return _sentencepiece_bytes
    if "WordPiece" in kinds:
        return lambda token: token[2:].encode() if token.startswith("##") else f" {token}".encode()
    if "BPEDecoder" in kinds:
        return lambda token: token.replace("</w>", " ").encode()
    raise ValueError(f"the tokenizer's decoder is {decoder.get('type')}: expected one of {', '.join(_DECODERS)}")


def _sentencepiece_bytes(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def frequent_words(captions: Iterable[str], min_count: int = 5) -> list[str]:
    """All words that occur at least `min_count` times, the most frequent first: a vocabulary for `WordTokenizer`.

    Raises:
        ValueError: `min_count` is no whole number of at least 1.
    """
    check_number("min_count", min_count, whole=True, at_least=1)
    counts = Counter(word for caption in captions for word in split_words(caption))
    return sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))


def unknown_words(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[list[str], int]:
    """The words of texts that a closed vocabulary lacks, repeated as often as they occur, and the number of all words;
    byte pairs know every word.
    """
    if not isinstance(tokenizer, WordTokenizer):
        return [], 0
    words = [word for text in texts for word in split_words(text)]
    known = set(tokenizer.spec)
    return [word for word in words if word not in known], len(words)


BYTE_PAIRS: dict[str, type[CLIPTokenizer | R50kTokenizer]] = {"clip": CLIPTokenizer, "r50k": R50kTokenizer}


def get_tokenizer(
    spec: str | Sequence[str] | Mapping[str, str] = "clip", context_length: int = CONTEXT_LENGTH
) -> Tokenizer:
    """The byte pairs of a name of `BYTE_PAIRS`, a `WordTokenizer` for a list of words, a `JsonTokenizer` for its
    arguments.

    Raises:
        ValueError: another name, a list with words that are not read, or a file that cannot be used.
    """
    if isinstance(spec, Mapping):
        if spec.keys() != {"packed", "start", "end", "pad"} or not all(isinstance(v, str) for v in spec.values()):
            given = ", ".join(f"{key}: {value!r:.40}" for key, value in spec.items())
            raise ValueError(f"a tokenizer.json needs packed, start, end and pad, each a text; got {given}")
        return JsonTokenizer(**spec, context_length=context_length)
    if not isinstance(spec, str):
        return WordTokenizer(spec, context_length)
    if spec not in BYTE_PAIRS:
        raise ValueError(f"unknown tokenizer '{spec}': expected {', '.join(map(repr, BYTE_PAIRS))} or a list of words")
    return _byte_pairs(spec, context_length)


@lru_cache(maxsize=4)
def _byte_pairs(name: str, context_length: int) -> Tokenizer:
    return BYTE_PAIRS[name](context_length)  # building the merge table takes a moment, so it is shared


def clean_whitespace(text: str) -> str:
    """OpenCLIP's cleaning: repaired Unicode, no control characters, HTML entities resolved twice, single blanks."""
    if not (text.isascii() and text.isprintable()) or "&" in text:  # other texts need none of the first three
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def split_words(text: str) -> list[str]:
    text = unicodedata.normalize("NFC", text.lower()).encode(errors="replace").decode()  # without lone surrogates
    return [word for word, _ in _WORDS.pre_tokenize_str(text)]


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    return [(left, right) for left, right in map(str.split, lines)]


def _token_bytes(token: str, byte_of: dict[str, int], end_of_word: str = "</w>") -> bytes:
    symbols = token.removesuffix(end_of_word)
    content = b"".join(bytes([byte_of[s]]) if s in byte_of else s.encode() for s in symbols)
    return content + (b" " if symbols != token else b"")


def _byte_of_symbol() -> dict[str, int]:
    """GPT-2's printable character for each of the 256 bytes, in the order of both vocabularies."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
