"""Token ids against OpenCLIP's own tokenizer, decoding, padding, and the word vocabulary."""

import base64
import hashlib
import itertools
import json
import random
import re
from pathlib import Path

import open_clip
import pytest
import regex
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, normalizers
from tokenizers import Tokenizer as HFTokenizer

from coca_lit.errors import DataError
from coca_lit.losses import caption_loss
from coca_lit.models import create_model
from coca_lit.tokenizer import (
    CLIPTokenizer,
    R50kTokenizer,
    Tokenizer,
    WordTokenizer,
    clean_whitespace,
    get_tokenizer,
    pack,
    split_words,
)
from coca_lit.weights.load import load_model, save_model
from helpers.fuzzing import fuzz
from helpers.shared_data import SHARED
from helpers.slow import slow
from helpers.tokenizer_files import SPECIAL, texts_of_many_scripts, trained_file

# What tokenizers treat in their own ways: marks and entities, contractions, numbers, blanks, what ftfy repairs, letters
# whose lower case is several, scripts, control characters, and long texts.
PIECES = [
    "!#$ sale!%",
    "DON'T we'Ll 'S 'T it's a\u017f",
    "12345 3.14 1st \u00bc \u00b2 \u2167 \u0661",
    "&amp;lt;b&amp;gt; &#x27;s",
    "two  blanks\tand\nnew\r\nlines\u2028\u00a0\u3000end",
    "caf\u00c3\u00a9 \u201cquoted\u201d \ufb01 e\u0301 \u212b",
    "\u00c6ther \u00df \u1e9e \u01c5 \u0130stanbul \u039f\u0394\u039f\u03a3 a\u0345.1",
    "\u65e5\u672c\u8a9e \U0001f469\u200d\U0001f467 \u263a\ufe0f",
    "nul\x00 bell\x07 tab\x0b del\x7f \x1b[31m \ufeff",
    "a_b-c/d <b>bold</b> http://x.y/?q=1",
    "x" * 90,
    "a " * 25,
]
ASSIGNED = st.characters(exclude_categories=["Cs", "Cn", "Co"], max_codepoint=0x1FFFF, exclude_characters="\U0001fae9")
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(ASSIGNED, max_size=8), max_size=6).map(" ".join)


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


@fuzz
@given(st.lists(TEXTS, min_size=1, max_size=20), st.sampled_from([5, 76, 77]))
def test_ids_equal_open_clip(texts: list[str], context_length: int) -> None:
    theirs = open_clip.tokenizer.SimpleTokenizer(context_length=context_length)
    assert_same_ids(get_tokenizer("clip", context_length), theirs, [*texts, "".join(texts)])


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


def test_call_pads_one_text_or_many(clip: Tokenizer) -> None:
    tokens = clip(["a dog", "!#$"])
    assert tokens.shape == (2, 76)
    assert tokens.dtype == torch.int64
    assert tokens[0, :5].tolist() == [49406, 320, 1929, 49407, 0]
    assert tokens[:, 5:].sum() == 0
    assert torch.equal(clip("a dog"), tokens[:1])
    assert clip([]).shape == (0, 76)


@fuzz
@given(TEXTS)
def test_decode_gives_the_text_back(clip: Tokenizer, text: str) -> None:
    """From ids with and without their ends and padding; blanks before marks are not kept, and so the ids count."""
    for ids in (clip.encode(text), clip(text)[0], clip.encode(text)[:-1], clip.encode(text)[1:-1]):
        assert clip.decode(ids) == clip.decode(clip.encode(text))
    if len(clip.encode(text)) < clip.context_length:
        assert clip.encode(clip.decode(clip.encode(text))) == clip.encode(text)
    assert clip.decode(clip.encode("a man in d\u00e9j\u00e0 vu \U0001f600 , the dog 's bowl")) == (
        "a man in d\u00e9j\u00e0 vu \U0001f600 , the dog 's bowl"
    )


def test_decode_equals_open_clip(clip: Tokenizer, theirs: open_clip.tokenizer.SimpleTokenizer) -> None:
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(49406) for _ in range(20)]  # any ids, also those that make no valid UTF-8
        assert clip.decode([*ids, clip.eot_id, 5, 6]) == theirs.decode(ids).strip()


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


def test_words_have_their_marks() -> None:
    for text in ("हिन्दी में", "বাংলা ভাষা", "தமிழ் சொல்", "ශ්\u200dරී ලංකා", "می\u200cکنم", "été n'est"):
        assert split_words(text) == text.split()
    assert split_words("Cafe\u0301 déjà") == ["café", "déjà"]
    assert split_words("\u0301a \udcff \u200d") == ["a"]


@fuzz
@given(st.text("aZéßµΔ9²½_''’--. \t日本長"))
def test_words_without_marks_are_runs_of_letters_and_digits(text: str) -> None:
    """Latin, Greek, Chinese, digits, underscores and punctuation, against Python's own letters and digits."""
    assert split_words(text) == re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


@pytest.fixture(scope="module")
def r50k() -> R50kTokenizer:
    return R50kTokenizer(context_length=400)


def test_unknown_words_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = WordTokenizer(["a", "dog"])
    tokenizer(["a dog", "a Cat"])
    tokenizer("a cat and a dog")
    tokenizer.tokens_of(["a horse"])  # of a data set
    assert [re.findall("'(.+?)'", record.getMessage()) for record in caplog.records] == [["cat"], ["and"]]
    tokenizer([f"word{i}" for i in range(2000)])
    assert "1,990 more" in caplog.messages[-1]
    model = create_model("coca_tiny", tokenizer=["a", "dog"]).eval()
    model.generate(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), prompt="a zebra", max_length=5)
    assert "'zebra'" in caplog.messages[-1]


def test_r50k_is_the_vocabulary_of_tiktoken(r50k: R50kTokenizer) -> None:
    """The file r50k_base.tiktoken, made of our merges, has the SHA-256 that tiktoken expects."""
    lines = (base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(r50k.token_bytes[:50256]))
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    assert digest == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert r50k.token_bytes[50256:] == [b""] * 4
    assert (r50k.vocab_size, r50k.eot_id, r50k.pad_id, r50k.sot_id) == (50260, 50257, 50258, 50259)


@fuzz
@given(TEXTS)
@example("A dog and TWO cats' 1234 toys\u2026 <|endoftext|>")
def test_r50k_encodes_as_tiktoken_does(r50k: R50kTokenizer, text: str) -> None:
    """Its algorithm in plain Python: in each piece the neighbours whose join has the lowest rank are joined first."""
    pieces = regex.compile(r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
    ranks = {token: i for i, token in enumerate(r50k.token_bytes[:50256])}
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
    assert ids == [50259, *expected, 50257][:399] + [50257] * (len(expected) > 397)
    if len(expected) < 397:
        assert r50k.decode(ids) == clean_whitespace(text)


@pytest.mark.parametrize("spec", ["clip", "r50k", ["b", "a"]])
def test_spec_builds_the_same_tokenizer(spec: str | list[str]) -> None:
    tokenizer = get_tokenizer(spec, context_length=12)
    again = get_tokenizer(json.loads(json.dumps(tokenizer.spec)), tokenizer.context_length)
    text = "a red circle b"
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode(text) == tokenizer.encode(text)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"'bert'.*'clip', 'r50k'"):
        get_tokenizer("bert")
    with pytest.raises(ValueError, match="lists a word twice"):
        WordTokenizer(["a", "b", "a"])
    for word in ("Red", "hot dog", "-", "", "snake_case", 3):
        with pytest.raises(ValueError, match=f"vocabulary.* {word!r}, "):
            get_tokenizer(["circle", word])
    for build in (CLIPTokenizer, lambda length: WordTokenizer(["a"], length)):
        with pytest.raises(ValueError, match=r"context_length.* 3 .* 2"):
            build(2)


@pytest.mark.parametrize("count", [300, *slow(20_000)])
@pytest.mark.parametrize("kind", ["ByteLevel", "Metaspace", "WordPiece"])
def test_a_tokenizer_file_gives_the_ids_of_its_source(kind: str, count: int, tmp_path: Path) -> None:
    file, texts = trained_file(kind, tmp_path), texts_of_many_scripts(count)
    source = HFTokenizer.from_file(str(file))
    source.no_truncation()
    source.no_padding()
    tokenizer = get_tokenizer({"packed": pack(file), **SPECIAL}, 200)
    start, end = (source.token_to_id(SPECIAL[name]) for name in ("start", "end"))
    found = tokenizer.encode_batch(texts)
    expected = source.encode_batch_fast(texts, add_special_tokens=False)
    assert found == [[start, *encoding.ids, end] for encoding in expected]
    assert [tokenizer.decode(ids) for ids in found] == [source.decode(encoding.ids).strip() for encoding in expected]
    again = get_tokenizer(json.loads(json.dumps(tokenizer.spec)), 200)
    assert again.encode_batch(texts[:50]) == found[:50]


def test_a_model_with_a_tokenizer_file(tmp_path: Path) -> None:
    """Trains, captions, and is loaded without the file; a text cannot name a special token."""
    file = trained_file("ByteLevel", tmp_path)
    torch.manual_seed(0)
    model = create_model("coca_tiny", tokenizer={"file": str(file), **SPECIAL})
    texts = texts_of_many_scripts(4)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    out = model(images, model.tokenizer(texts))
    loss = caption_loss(out.hidden, out.vocabulary, out.labels)
    loss.backward()
    assert model.text.token_embedding.weight.grad is not None
    save_model(model, tmp_path / "model.safetensors")
    file.unlink()
    again = load_model(tmp_path / "model.safetensors")
    assert again.tokenizer(texts).tolist() == model.tokenizer(texts).tolist()
    captions = again.generate(images)
    assert captions.tolist() == model.eval().generate(images).tolist()
    assert isinstance(again.tokenizer.decode(captions[0]), str)
    assert again.tokenizer.encode("</s>").count(again.tokenizer.eot_id) == 1
    assert again.tokenizer.decode(again.tokenizer.encode("</s> ñ")) == "</s> ñ"


@pytest.mark.parametrize("kind", ["ByteLevel", "Metaspace", "WordPiece", "whole words", "words"])
def test_special_tokens_in_a_text_are_text(kind: str, tmp_path: Path) -> None:
    """Also where the model of the library knows them as words: a Unigram such as those of XLM-R and T5, a vocabulary of
    words, and byte pairs that look a word up before they merge.
    """
    family = {"whole words": "ByteLevel", "words": "WordPiece"}.get(kind, kind)
    described = json.loads(trained_file(family, tmp_path).read_text())
    if kind == "whole words":
        described["model"]["ignore_merges"] = True
        described["pre_tokenizer"] = described["pre_tokenizer"] | {"use_regex": False}
    elif kind == "words":
        words = {name: described["model"]["vocab"][name] for name in (*SPECIAL.values(), "<unk>")}
        described["model"] = {"type": "WordLevel", "vocab": words | {"a": 9}, "unk_token": "<unk>"}
        described["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = get_tokenizer({"packed": pack(tmp_path / "tokenizer.json"), **SPECIAL}, 60)
    special = {tokenizer.sot_id, tokenizer.eot_id, tokenizer.pad_id}
    for text in ("a </s> a", "<s>", "</s>", "<pad> a", "a<s></s>"):
        inside = tokenizer.encode(text)[1:-1]
        assert inside, text
        assert not special & {*inside}, text
    if kind in ("ByteLevel", "whole words"):
        assert tokenizer.decode(tokenizer.encode("a </s> a")) == "a </s> a"


def test_the_end_is_a_label_where_it_is_the_unknown_token_of_bytes(tmp_path: Path) -> None:
    """As in the files of OpenAI's CLIP. Where words can be unknown, they would end a text."""
    described = json.loads(trained_file("ByteLevel", tmp_path).read_text())
    described["model"]["unk_token"] = SPECIAL["end"]
    (tmp_path / "bytes.json").write_text(json.dumps(described))
    model = create_model("coca_tiny", tokenizer={"file": str(tmp_path / "bytes.json"), **SPECIAL})
    texts = texts_of_many_scripts(4)
    labels = model(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), model.tokenizer(texts)).labels
    assert int((labels == model.tokenizer.eot_id).sum()) == 4
    for kind in ("ByteLevel", "WordPiece"):
        described = json.loads(trained_file(kind, tmp_path).read_text())
        described["model"]["unk_token"] = SPECIAL["end"]
        if kind == "ByteLevel":  # without the first byte of many Cyrillic letters
            del described["model"]["vocab"]["Ð"]
            described["model"]["merges"] = [pair for pair in described["model"]["merges"] if "Ð" not in "".join(pair)]
        (tmp_path / "words.json").write_text(json.dumps(described))
        with pytest.raises(ValueError, match="token for unknown words is '</s>': name another token as end"):
            get_tokenizer({"packed": pack(tmp_path / "words.json"), **SPECIAL})


def test_a_file_of_clip_writes_words_with_blanks_between_them(clip: Tokenizer, tmp_path: Path) -> None:
    """Its tokens end in </w> at the end of a word, and its decoder is the one of GPT-2's bytes."""
    file = HFTokenizer.from_str(clip.bpe.to_str())
    file.decoder = decoders.ByteLevel()
    special = {"start": "<|startoftext|>", "end": "<|endoftext|>", "pad": "<pad>"}
    file.add_special_tokens([*special.values()])
    file.save(str(tmp_path / "clip.json"))
    read = get_tokenizer({"packed": pack(tmp_path / "clip.json"), **special})
    text = "a dog on the beach, naïve and 3 o'clock"
    assert read.encode(text)[1:-1] == clip.encode(text)[1:-1]
    assert read.decode(read.encode(text)) == clip.decode(clip.encode(text))


def test_the_steps_of_public_files_are_taken(tmp_path: Path) -> None:
    path = trained_file("Metaspace", tmp_path)
    source = HFTokenizer.from_file(str(path))
    for steps in (
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],  # Llama
        [  # XLNet, whose table of SentencePiece is NFKC
            *(normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.NFKD()),
            *(normalizers.StripAccents(), normalizers.Lowercase()),
            normalizers.Precompiled(bytes([4, *[0] * 7]) + "صلى الله عليه وسلم\0".encode()),
            normalizers.Replace(Regex(" {2,}"), " "),
        ],
    ):
        source.normalizer = normalizers.Sequence(steps)
        source.save(str(path))
        get_tokenizer({"packed": pack(path), **SPECIAL})


def test_a_tokenizer_file_that_cannot_be_used(tmp_path: Path) -> None:
    file = trained_file("ByteLevel", tmp_path)
    packed = pack(file)
    for change, message in (
        ({"start": "[CLS]"}, r"\[CLS\]"),
        ({"pad": "<s>"}, "three tokens"),
        ({"packed": "abc"}, "not a tokenizer"),
        ({"file": "/etc/passwd"}, "packed, start"),
        ({"pad": 0}, "pad, each a text; got .*, pad: 0$"),
    ):
        with pytest.raises(ValueError, match=message):
            get_tokenizer({"packed": packed, **SPECIAL, **change})
    described = json.loads(file.read_text())
    noise = {f"{random.Random(i).getrandbits(256):x}": 1000 + i for i in range(120_000)}
    described["model"]["vocab"] = noise
    (tmp_path / "large.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"large\.json takes .* bytes in a checkpoint, where 3,145,728 are read"):
        pack(tmp_path / "large.json")
    source = HFTokenizer.from_file(str(file))
    source.decoder = decoders.CTC()
    source.save(str(file))
    with pytest.raises(DataError, match=r"absent\.json is not a readable tokenizer\.json: .*No such file"):
        create_model("coca_tiny", tokenizer={"file": str(tmp_path / "absent.json"), **SPECIAL})
    with pytest.raises(ValueError, match="decoder is CTC"):
        get_tokenizer({"packed": pack(file), **SPECIAL})


def test_a_text_that_is_too_long_keeps_its_answer() -> None:
    tokenizer = WordTokenizer(["a", "b"], context_length=8)
    ids, given = tokenizer.encode_answer("a a a a a a a a a", "b")
    assert (ids, given) == ([1, 4, 4, 4, 4, 4, 5, 2], 6)
    ids, given = tokenizer.encode_answer("a a a a a", "b b b b b b b")
    assert (ids, given) == ([1, 4, 4, 4, 5, 5, 5, 2], 4)
    assert tokenizer.encode_answer("a", "b") == ([1, 4, 5, 2], 2)
