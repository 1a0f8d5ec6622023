"""Token ids against OpenCLIP's own tokenizer, decoding, padding, and the word vocabulary."""

import base64
import hashlib
import itertools
import json
import random
import unicodedata
from pathlib import Path

import open_clip
import pytest
import regex
import torch
from conftest import SHARED

from coca_lit.tokenizer import (
    CLIPTokenizer,
    R50kTokenizer,
    Tokenizer,
    WordTokenizer,
    clean_text,
    clean_whitespace,
    frequent_words,
    get_tokenizer,
)

TRICKY = [
    "",
    " ",
    "!#$ sale!% #!/bin ! !!",
    "DON'T we'Ll 'S 'T it's",
    "12345 3.14 1st \u00bc \u00b2 \u2167 \u0661\u0662\u0663",
    "two  blanks\tand\nnew\r\nlines\u2028\u00a0\u3000end",
    "&amp;lt;b&amp;gt; &lt;3 &nbsp;x &#x27;s & {}[]<>&",
    "caf\u00c3\u00a9 \u201cquoted\u201d \u2019s \ufb01 \ufb02 e\u0301 \u212b",  # ftfy repairs some of these
    "\u00c6ther \u00df \u1e9e \u01c5 \u0130stanbul \u039f\u0394\u039f\u03a3",  # lower case is not one to one
    "\u65e5\u672c\u8a9e \u30c6\u30b9\u30c8 \U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u263a\ufe0f",
    "nul\x00 bell\x07 tab\x0b feed\x0c del\x7f \x1b[31mred\x1b[0m",
    "\ufeff bom",
    "a_b-c/d <b>bold</b> @user #tag http://x.y/?q=1",
    "x" * 300,
    "a " * 73,
    "a " * 74,
    "a " * 75,
    "supercalifragilistic " * 30,
]


@pytest.fixture(scope="module")
def theirs() -> open_clip.tokenizer.SimpleTokenizer:
    return open_clip.get_tokenizer("coca_ViT-B-32")


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return get_tokenizer("clip")


def assert_same_ids(ours: Tokenizer, theirs: open_clip.tokenizer.SimpleTokenizer, texts: list[str]) -> None:
    a, b = ours(texts), theirs(texts)
    different = [texts[i] for i in (a != b).any(dim=1).nonzero()[:, 0].tolist()]
    assert different == []


def test_special_ids(clip: Tokenizer) -> None:
    assert (clip.vocab_size, clip.pad_id, clip.sot_id, clip.eot_id, clip.context_length) == (49408, 0, 49406, 49407, 76)
    assert clip.encode("a dog") == [49406, 320, 1929, 49407]  # as in openai/CLIP
    assert clip.encode("!#$") == [49406, 0, 2, 259, 49407]


@pytest.mark.parametrize("text", TRICKY)
def test_ids_equal_open_clip(clip: Tokenizer, theirs: open_clip.tokenizer.SimpleTokenizer, text: str) -> None:
    assert_same_ids(clip, theirs, [text])


@pytest.mark.parametrize("context_length", [5, 77])
def test_ids_equal_open_clip_in_other_contexts(context_length: int) -> None:
    theirs = open_clip.tokenizer.SimpleTokenizer(context_length=context_length)
    assert_same_ids(get_tokenizer("clip", context_length), theirs, TRICKY)


def test_ids_of_random_strings_equal_open_clip(clip: Tokenizer, theirs: open_clip.tokenizer.SimpleTokenizer) -> None:
    """Left out: characters that are not in every Unicode version, and two that ignoring case confuses with others."""
    generator = random.Random(0)
    ranges = [range(1, 128), range(128, 0x400), range(0x2000, 0x2100), range(1, 0x3000), range(0x1F300, 0x1F700)]

    def character() -> str:
        c = chr(generator.choice(generator.choice(ranges)))
        return " " if unicodedata.category(c) == "Cn" or c in "\u017f\u0345" else c

    texts = ["".join(character() for _ in range(generator.randrange(30))) for _ in range(1500)]
    assert_same_ids(clip, theirs, texts)


def captions_of(file: Path) -> list[str]:
    content = json.loads(file.read_text())
    if "images" in content and "sentences" in content["images"][0]:
        return [sentence["raw"] for image in content["images"] for sentence in image["sentences"]]
    return [annotation["caption"] for annotation in content["annotations"]]


@pytest.mark.parametrize("name", ["captions/fakecap_refs.json", "flickr8k/dataset_flickr8k.json"])
def test_real_captions_equal_open_clip(clip: Tokenizer, theirs: open_clip.tokenizer.SimpleTokenizer, name: str) -> None:
    if not (SHARED / name).is_file():
        pytest.skip("shared caption data not present")
    assert_same_ids(clip, theirs, captions_of(SHARED / name)[::7][:3000])


def test_special_tokens_in_a_caption_stay_text(clip: Tokenizer) -> None:
    for text in ("<end_of_text>", "a <start_of_text> b"):
        ids = clip.encode(text)
        assert ids.count(clip.eot_id) == ids.count(clip.sot_id) == 1
        assert clip.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_truncation_keeps_the_beginning_and_ends_properly(clip: Tokenizer) -> None:
    ids = clip.encode("a dog " * 50)
    assert len(ids) == 76
    assert ids == [clip.sot_id, *[320, 1929] * 37, clip.eot_id]
    assert len(clip.encode("a " * 74)) == 76
    assert len(clip.encode("a " * 73)) == 75


def test_call_pads_one_text_or_many(clip: Tokenizer) -> None:
    tokens = clip(["a dog", "!#$"])
    assert tokens.shape == (2, 76)
    assert tokens.dtype == torch.int64
    assert tokens[0, :5].tolist() == [49406, 320, 1929, 49407, 0]
    assert tokens[:, 5:].sum() == 0
    assert torch.equal(clip("a dog"), tokens[:1])
    assert clip([]).shape == (0, 76)


@pytest.mark.parametrize(
    "text", ["a man in a red shirt .", "!#$", "x !", "d\u00e9j\u00e0 vu \U0001f600", "the dog 's bowl 1 2"]
)
def test_decode_gives_the_text_back(clip: Tokenizer, text: str) -> None:
    for ids in (clip.encode(text), clip(text)[0], clip.encode(text)[:-1], clip.encode(text)[1:-1]):
        decoded = clip.decode(ids)
        assert decoded == text
        assert clip.encode(decoded) == clip.encode(text)


def test_decode_equals_open_clip(clip: Tokenizer, theirs: open_clip.tokenizer.SimpleTokenizer) -> None:
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(49406) for _ in range(20)]  # any ids, also those that make no valid UTF-8
        assert clip.decode([*ids, clip.eot_id, 5, 6]) == theirs.decode(ids).strip()


def test_clean_text_leaves_plain_captions_alone() -> None:
    assert clean_text("A dog; it runs.") == "a dog; it runs."


# ---------------------------------------------------------------- words


@pytest.fixture
def words() -> WordTokenizer:
    return WordTokenizer(["dog", "runs", "o'clock", "t-shirt"], context_length=6)


def test_words_become_ids_and_words_again(words: WordTokenizer) -> None:
    assert (words.vocab_size, words.pad_id, words.sot_id, words.eot_id, words.unk_id) == (8, 0, 1, 2, 3)
    assert words.encode("Dog RUNS!") == [1, 4, 5, 2]
    assert words.encode("the t-shirt, o'clock") == [1, 3, 7, 6, 2]
    assert words.encode("dog " * 9) == [1, 4, 4, 4, 4, 2]
    assert words("runs").tolist() == [[1, 5, 2, 0, 0, 0]]
    assert words.decode([1, 4, 3, 7, 2, 5]) == "dog t-shirt"
    assert words.decode(words("dog runs")[0, :3]) == "dog runs"


@pytest.fixture(scope="module")
def r50k() -> R50kTokenizer:
    return R50kTokenizer(context_length=400)


def test_r50k_is_the_vocabulary_of_tiktoken(r50k: R50kTokenizer) -> None:
    """The file r50k_base.tiktoken, made of our merges, has the SHA-256 that tiktoken expects."""
    lines = (base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(r50k.token_bytes[:50256]))
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    assert digest == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert r50k.token_bytes[50256:] == [b""] * 4
    assert (r50k.vocab_size, r50k.eot_id, r50k.pad_id, r50k.sot_id) == (50260, 50257, 50258, 50259)


def test_r50k_encodes_as_tiktoken_does(r50k: R50kTokenizer) -> None:
    """Its algorithm in plain Python: in each piece the neighbours whose join has the lowest rank are joined first."""
    pieces = regex.compile(r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
    ranks = {token: i for i, token in enumerate(r50k.token_bytes[:50256])}
    for text in [*TRICKY, "A dog and TWO cats' 1234 toys\u2026 <|endoftext|>"]:
        expected = []
        for piece in pieces.findall(clean_whitespace(text)):
            parts = [bytes([byte]) for byte in piece.encode()]
            while True:
                joins = [(ranks.get(a + b, 99999), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
                if not joins or min(joins)[0] == 99999:
                    break
                i = min(joins)[1]
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            expected += [ranks[part] for part in parts]
        ids = r50k.encode(text)
        assert ids == [50259, *expected, 50257][:399] + [50257] * (len(expected) > 397), text
        if len(expected) < 397:
            assert r50k.decode(ids) == clean_whitespace(text)
    assert r50k.encode("Hello, world!") == [50259, 15496, 11, 995, 0, 50257]  # GPT-2's, as published
    assert R50kTokenizer(4).encode("a b c d")[-1] == 50257


def test_vocabulary_from_captions_is_ordered_by_count() -> None:
    assert frequent_words(["A dog runs.", "a DOG", "a cat", "b"], min_count=2) == ["a", "dog"]


@pytest.mark.parametrize("spec", ["clip", "r50k", ["b", "a"]])
def test_spec_builds_the_same_tokenizer(spec: str | list[str]) -> None:
    tokenizer = get_tokenizer(spec, context_length=12)
    again = get_tokenizer(json.loads(json.dumps(tokenizer.spec)), tokenizer.context_length)
    text = "a red circle b"
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode(text) == tokenizer.encode(text)


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown tokenizer 'bert': expected 'clip', 'r50k' or a list of words"):
        get_tokenizer("bert")
    with pytest.raises(ValueError, match="lists a word twice"):
        WordTokenizer(["a", "b", "a"])
    for word in ("Red", "hot dog", "-", "", "snake_case", 3):
        with pytest.raises(ValueError, match=f"^the vocabulary has {word!r}, which is not read as one word: expected"):
            get_tokenizer(["circle", word])
    for build in (CLIPTokenizer, lambda length: WordTokenizer(["a"], length)):
        with pytest.raises(ValueError, match=r"context_length must be at least 3 .*got 2"):
            build(2)
