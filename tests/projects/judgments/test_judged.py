"""Published files of judgements, as their authors lay them out; strangers' files are refused in one sentence."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

scipy_io = pytest.importorskip("scipy.io")

from hypothesis import given
from hypothesis import strategies as st

from coca_lit.errors import DataError
from coca_lit.projects.judgments.judged import Candidate, Grade, Preference, read_judgments
from coca_lit.projects.judgments.matlab import read_mat
from helpers.fuzzing import bounded, damaged, fuzz

TOKENS = "\n".join(f"{image}.jpg#{n}\t{word} {n} ." for image, word in (("1_a", "dog"), ("2_b", "cat")) for n in (0, 1))
EXPERTS = "1_a.jpg\t2_b.jpg#0\t1\t1\t2\n1_a.jpg\t1_a.jpg#1\t4\t4\t3\n2_b.jpg\t1_a.jpg#0\t2\t1\t1\n"
CROWD = "1_a.jpg\t2_b.jpg#0\t0\t0\t3\n1_a.jpg\t1_a.jpg#1\t1\t3\t0\n2_b.jpg\t1_a.jpg#0\t0.333333333\t1\t2\n"
TABLE = (
    "image,caption,grade,judge,pair\n1_a.jpg,a hat,2,ann,x\n1_a.jpg,a dog,3,bob,x\n"
    "2_b,dog 0 .,1,ann,\n2_b,cat 0 .,5,,\n"
)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / "Flickr8k.token.txt").write_text(TOKENS)
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_experts(tmp_path: Path) -> None:
    judged = read_judgments(write(tmp_path, "ExpertAnnotations.txt", EXPERTS))
    assert judged.candidates == [Candidate("1_a", "cat 0 ."), Candidate("2_b", "dog 0 .")]
    assert judged.grades == [
        *(Grade(0, value, f"expert {n}") for n, value in ((1, 1.0), (2, 1.0), (3, 2.0))),
        *(Grade(1, value, f"expert {n}") for n, value in ((1, 2.0), (2, 1.0), (3, 1.0))),
    ]
    assert judged.left_out == 1  # the photo's own caption
    assert judged.references == {"1_a": ["dog 0 .", "dog 1 ."], "2_b": ["cat 0 .", "cat 1 ."]}


def test_the_crowd(tmp_path: Path) -> None:
    """A judged caption of the photo itself stays, and is no reference."""
    judged = read_judgments(write(tmp_path, "CrowdFlowerAnnotations.txt", CROWD))
    assert [grade.value for grade in judged.grades] == [0, 1, 0.333333333]
    assert judged.references == {"1_a": ["dog 0 ."], "2_b": ["cat 0 .", "cat 1 ."]}
    assert judged.votes == {0: (0, 3), 1: (3, 0), 2: (1, 2)}
    assert judged.of(["2_b"]).votes == {0: (1, 2)}


def test_any_table(tmp_path: Path) -> None:
    judged = read_judgments(write(tmp_path, "mine.csv", TABLE))
    assert judged.candidates == [Candidate("1_a", "a hat"), Candidate("1_a", "a dog"), Candidate("2_b", "dog 0 .")]
    assert [(g.candidate, g.value, g.judge) for g in judged.grades] == [(0, 2, "ann"), (1, 3, "bob"), (2, 1, "ann")]
    assert judged.preferences == [Preference(1, 0)]
    coco = {
        "images": [{"id": 7, "file_name": "1_a.jpg"}, {"id": 8, "file_name": "2_b.jpg"}],
        "annotations": [{"image_id": i, "caption": "a ball"} for i in (7, 8)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    assert read_judgments(tmp_path / "mine.csv", tmp_path / "coco.json").references["2_b"] == ["a ball"]
    by_id = write(tmp_path, "ids.csv", "image,caption,rating\n7,a hat,2\n")
    assert read_judgments(by_id, tmp_path / "coco.json").images == {"7": "1_a.jpg"}


def test_ids_that_are_names_of_other_files(tmp_path: Path) -> None:
    """The ids 0, 1, 2 of the files 1.jpg, 2.jpg, 3.jpg: a name is that of a file first."""
    coco = {
        "images": [{"id": i, "file_name": f"{i + 1}.jpg"} for i in range(3)],
        "annotations": [{"image_id": i, "caption": f"of file {i + 1}"} for i in range(3)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    table = write(tmp_path, "mine.csv", "image,caption,grade\n" + "".join(f"{i},a hat,{i}\n" for i in range(4)))
    judged = read_judgments(table, tmp_path / "coco.json")
    assert judged.references == {"0": ["of file 1"], **{str(i): [f"of file {i}"] for i in (1, 2, 3)}}
    assert judged.images == {"0": "1.jpg", "1": "1.jpg", "2": "2.jpg", "3": "3.jpg"}


def test_photos_of_one_name_in_two_folders_have_their_ids_alone(tmp_path: Path) -> None:
    coco = {
        "images": [{"id": i, "file_name": f"{of}s/1.jpg"} for i, of in ((7, "dog"), (8, "cat"))],
        "annotations": [{"image_id": i, "caption": f"a {of}"} for i, of in ((7, "dog"), (8, "cat"))],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    by_id = write(tmp_path, "ids.csv", "image,caption,grade\n7,a hat,2\n8,a hat,1\n")
    judged = read_judgments(by_id, tmp_path / "coco.json")
    assert judged.references == {"7": ["a dog"], "8": ["a cat"]}
    assert judged.images == {"7": "dogs/1.jpg", "8": "cats/1.jpg"}
    by_name = write(tmp_path, "names.csv", "image,caption,grade\ndogs/1.jpg,a hat,2\ncats/1.jpg,a hat,1\n")
    with pytest.raises(DataError, match="1"):
        read_judgments(by_name, tmp_path / "coco.json")


def test_a_pair_of_two_images_is_refused(tmp_path: Path) -> None:
    rows = "image,caption,grade,pair\n1_a,a hat,3,p\n2_b,a hat,2,p\n"
    with pytest.raises(DataError, match="pair 'p' is of two images"):
        read_judgments(write(tmp_path, "mine.csv", rows))


def test_pairs_and_judges_count_from_zero(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = write(tmp_path, "mine.parquet", b"")
    columns = {"image": ["1_a"] * 5, "caption": list("abcde"), "grade": [1, 2, 4, 3, 5]}
    pq.write_table(pa.table({**columns, "pair": [0, 0, 1, 1, None], "judge": [0, 1, 0, 1, None]}), path)
    judged = read_judgments(path)
    assert judged.preferences == [Preference(1, 0), Preference(2, 3)]
    assert [grade.judge for grade in judged.grades] == ["0", "1", "0", "1", ""]


@pytest.mark.parametrize("count", [3, 4])
def test_composite(tmp_path: Path, count: int) -> None:
    """Three captions of each row count, also of those with four; the files end with empty rows."""
    captions, grades = ["dog 1 .", "a hat", "a ball", "a fourth"][:count], ["5", "2", "1", "4"][:count]
    row = [*("" for _ in range(27)), "http://x.org/images/1_a.jpg", *captions, *grades]
    content = "\n".join(";".join(line) for line in ([f"c{i}" for i in range(len(row))], row, ["" for _ in row]))
    judged = read_judgments(write(tmp_path, "8k_correctness.csv", content))
    assert [(c.caption, g.value) for c, g in zip(judged.candidates, judged.grades, strict=True)] == [
        *(("dog 1 .", 5), ("a hat", 2), ("a ball", 1))
    ]
    assert judged.references == {"1_a": ["dog 0 ."]}


def cells(text: str) -> np.ndarray:
    cell = np.empty((1, 1), dtype=object)
    cell[0, 0] = text
    return cell


def pascal(folder: Path, votes: list[list[int]], compressed: bool = True) -> Path:
    """Pairs of captions of two images, with 1 for a vote for the first caption and -1 for the second."""
    pairs = np.empty((1, len(votes)), dtype=[(name, object) for name in ("image", "b", "c")])
    triplets = np.empty((1, sum(map(len, votes))), dtype=[(name, object) for name in ("a", "b", "c", "winner")])
    place = 0
    for n, own in enumerate(votes):
        first, second = f"first of {n}", f"second of {n}"
        pairs[0, n] = (f"2008_{n // 2}.jpg", first, second)
        for i, vote in enumerate(own):
            triplets[0, place] = (cells(f"reference {i} of {n // 2}"), cells(first), cells(second), np.array([[vote]]))
            place += 1
    kinds = np.array([[n % 4 + 1 for n in range(len(votes))]], dtype=np.uint8)
    path = folder / "pair_pascal.mat"
    scipy_io.savemat(path, {"new_input": pairs, "category": kinds}, do_compression=compressed)
    scipy_io.savemat(folder / "consensus_pascal.mat", {"triplets": triplets}, do_compression=compressed)
    return path


@pytest.mark.parametrize("compressed", [True, False])
def test_pascal(tmp_path: Path, compressed: bool) -> None:
    judged = read_judgments(
        pascal(tmp_path, [[1] * 5 + [-1] * 3, [-1] * 8, [1, -1] * 4, [-1] * 5 + [1] * 3], compressed)
    )
    assert judged.preferences == [Preference(0, 1, "HC"), Preference(3, 2, "HI"), Preference(7, 6, "MM")]
    assert judged.left_out == 1
    assert judged.candidates[3] == Candidate("2008_0", "second of 1")
    assert {image: len(texts) for image, texts in judged.references.items()} == {"2008_0": 5, "2008_1": 5}
    assert set(judged.references["2008_1"]) <= {f"reference {i} of 1" for i in range(8)}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("ExpertAnnotations.txt", EXPERTS.replace("2_b.jpg#0", "2_b.jpg#7"), "'2_b.jpg#7', whose text is unknown"),
        ("ExpertAnnotations.txt", EXPERTS.replace("\t2\n", "\tnan\n"), "Flickr8k's schema: "),
        ("ExpertAnnotations.txt", "1_a.jpg\t1_a.jpg#0\t4\t4\t3\n", "all captions of .* equal a reference"),
        ("ExpertAnnotations.txt", "3.jpg\t1_a.jpg#0\t4\t4\t3\n", "1 of 1 judged images have no references, e.g. '3'"),
        ("ExpertAnnotations.txt", "1_a.jpg\t1_a.jpg#0\t4\t4\t3\n1_a.jpg\t2_b.jpg#0\t4\n", "Flickr8k's schema"),
        ("CrowdFlowerAnnotations.txt", "1_a.jpg\t1_a.jpg#0\t1\t1\t0\n1_a.jpg\t1_a.jpg#1\t1\t1\t0\n", "none is left"),
        ("mine.csv", "image,caption\n1_a,a hat\n", "no column of the usual names .grade"),
        ("mine.csv", "image,caption,grade\n1_a,a hat,good\n", "could not convert"),
        ("mine.csv", "image,caption,grade\n1_a,a hat,inf\n", "a grade must be a number"),
        ("mine.csv", TABLE + "1_a,a ball,1,,x\n", "the pair 'x' has 3 rows"),
        ("mine.csv", "image,caption,grade\n", "holds no judgements"),
        ("mine.csv", b'image,caption,grade\n"' + b"x" * 200_000, "not a readable table"),
        ("8k_correctness.csv", ";" * 40 + "\n" + ";" * 27 + "1_a;" + ";" * 9, "Composite's schema"),
        ("pair_pascal.mat", b"no MATLAB", "no MATLAB file of level 5"),
    ],
)
def test_files_of_strangers(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_judgments(write(tmp_path, name, content))


def test_matlab_files_are_read_as_scipy_reads_them(tmp_path: Path) -> None:
    values = {
        "numbers": np.arange(6.0).reshape(2, 3),
        "small": np.array([[1, -2]], dtype=np.int16),
        "none": np.zeros((0, 0)),
    }
    for compressed in (True, False):
        scipy_io.savemat(tmp_path / "x.mat", {**values, "text": "é dog"}, do_compression=compressed)
        found = read_mat(tmp_path / "x.mat")
        for name, truth in values.items():
            np.testing.assert_array_equal(found[name], scipy_io.loadmat(tmp_path / "x.mat")[name])
            assert found[name].shape == truth.shape
        assert found["text"] == "é dog"


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


HEAD = b"MATLAB".ljust(124) + b"\x00\x01IM"


def nested(depth: int) -> bytes:
    """A cell in a cell in a cell."""
    start = element(6, struct.pack("<II", 1, 0)) + element(5, struct.pack("<ii", 1, 1)) + element(1, b"")
    content, parts = element(14, b""), []
    size = len(content)
    for _ in range(depth):
        parts.append(struct.pack("<II", 14, len(start) + size) + start)
        size += 8 + len(start)
    return HEAD + b"".join(reversed(parts)) + content


@pytest.mark.parametrize(
    ("content", "said"),
    [  # made by the test: some take seconds
        (lambda: nested(200_000), "nested deeper than 8"),  # SciPy's reader ends the process
        (lambda: HEAD + element(15, zlib.compress(bytes(2**29), 1)), "unpacked it has more than"),
        (
            lambda: HEAD + element(14, element(6, b"\1" * 8) + element(5, struct.pack("<ii", 9, 9)) + element(1, b"")),
            "81",
        ),
        (lambda: HEAD + struct.pack("<II", 14, 2**31), "ends in the middle"),
        (lambda: nested(2)[:-4], "ends in the middle"),
    ],
)
def test_matlab_files_of_strangers(tmp_path: Path, content: Callable[[], bytes], said: str) -> None:
    (tmp_path / "x.mat").write_bytes(content())
    with bounded(), pytest.raises(DataError, match=said):
        read_mat(tmp_path / "x.mat")


def test_matlab_parts_share_one_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part takes all of it, exactly."""
    monkeypatch.setattr("coca_lit.projects.judgments.matlab.MAX_BYTES", 2**16)
    parts = [zlib.compress(element(1, bytes(size - 8))) for size in (2**16, 2**20)]
    headed = [struct.pack("<II", 15, len(part)) + part for part in parts]
    (tmp_path / "x.mat").write_bytes(HEAD + headed[0])
    assert read_mat(tmp_path / "x.mat") == {}
    (tmp_path / "x.mat").write_bytes(HEAD + b"".join(headed))
    with pytest.raises(DataError, match="unpacked it has more than 0 bytes"):
        read_mat(tmp_path / "x.mat")


@pytest.mark.slow
@fuzz
@given(st.data())
def test_forged_judgments(forged_files: Path, data: st.DataObject) -> None:
    composite = ";".join(["", *[f"c{i}" for i in range(39)]]) + "\n" + ";" * 27 + "1_a.jpg;a;b;c;1;2;3\n"
    for name, content in (
        ("ExpertAnnotations.txt", EXPERTS),
        ("CrowdFlowerAnnotations.txt", CROWD),
        ("mine.csv", TABLE),
        ("8k_correctness.csv", composite),
    ):
        path = write(forged_files, name, data.draw(damaged(content.encode())))
        with bounded():
            read_judgments(path)
    (forged_files / "Flickr8k.token.txt").write_bytes(data.draw(damaged(TOKENS.encode())))
    (forged_files / "ExpertAnnotations.txt").write_text(EXPERTS)
    with bounded():
        read_judgments(forged_files / "ExpertAnnotations.txt")


@pytest.mark.slow
@fuzz
@given(st.data())
def test_forged_matlab_files(forged_files: Path, data: st.DataObject) -> None:
    path = pascal(forged_files, [[1, 1, -1], [-1, -1, 1]], compressed=data.draw(st.booleans()))
    for name in ("pair_pascal.mat", "consensus_pascal.mat"):
        content = (forged_files / name).read_bytes()
        (forged_files / name).write_bytes(data.draw(damaged(content)))
        with bounded():
            read_judgments(path)
        (forged_files / name).write_bytes(content)
