"""The page in a real browser: what a visitor does, and files that must be refused. Skipped where no browser is."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from coca_lit.extensions import declared
from coca_lit.models import create_model
from coca_lit.tools.checkpoint import write_scenes
from coca_lit.tools.search.index import ImageIndex

pytestmark = pytest.mark.slow  # a real browser

# Keeps what the buttons have said, however briefly.
SEE_BUTTONS = """() => {
    window.seen = [];
    new MutationObserver(() => document.querySelectorAll("button").forEach((b) => window.seen.push(b.innerText)))
        .observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
# What reaches beyond its window.
CUT = """() => [...document.querySelectorAll("#captions td, #captions th, #examples img, #found img")]
    .filter((part) => part.checkVisibility() && part.getBoundingClientRect().right > window.innerWidth)
    .map((part) => part.outerHTML)"""
# The page may replace any part at any time, so what belongs together is read at once, when it is complete.
# The captions: rows of caption, how sure of its words, how it fits the photo; those of a column fall, if one is named.
CAPTIONS = """(column) => {
    const rows = [...document.querySelectorAll("#captions tr")].map((row) => [...row.querySelectorAll("td")]);
    const cells = rows.filter((row) => row.length).map((row) => row.map((cell) => cell.innerText));
    const shares = column === null ? [] : cells.map((row) => parseInt(row[column].match(/\\d+%/)));
    const best = document.querySelector("#captions .best"), text = document.querySelector("#captions")?.innerText;
    const maps = [...document.querySelectorAll("#captions .maps figcaption")].map((word) => word.innerText);
    const falls = shares.every((share, i) => i == 0 || share <= shares[i - 1]);
    if (!(cells.length && best && falls)) return null;
    return {cells, text, best: best.innerText, maps: maps.join(" ")};
}"""
FOUND = """(count) => {
    const labels = [...document.querySelectorAll("#found .caption-label")].map((label) => label.textContent);
    return labels.length == count ? labels : null;
}"""
# What a message says, which is closed.
MESSAGE = """() => {
    const message = document.querySelector(".toast-body"), text = message && message.innerText;
    if (text) message.querySelector(".toast-close").click();
    return text;
}"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of a small model with random weights, with twelve scenes to search."""
    pytest.importorskip("gradio")
    from coca_lit.tools.demo.page import build_page, serve

    torch.manual_seed(0)
    model = create_model("coca_tiny").eval()
    index = ImageIndex(model, write_scenes(tmp_path_factory.mktemp("scenes"), count=12))
    index.update()
    page = build_page(model, "tiny.safetensors", index, builtin=True)
    yield serve(page, port=None, wait=False)
    page.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        bundled = started.chromium.executable_path
        found = [shutil.which(name) for name in BROWSERS] + ([bundled] if os.path.exists(bundled) else [])
        path = next((path for path in found if path), None)
        if path is None:
            pytest.skip(f"no browser: looked for {', '.join(BROWSERS)} and that of `playwright install chromium`")
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(address, browser):
    """The page, open; the test fails if it asked another machine for anything or reported an error of its own."""
    tab = browser.new_page(viewport={"width": 1400, "height": 1000})
    tab.set_default_timeout(120_000)
    asked, broken = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: broken.append(str(error)))
    tab.goto(address)
    tab.wait_for_selector("#photo input[type=file]", state="attached")
    yield tab
    tab.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert broken == []


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    return next(write_scenes(tmp_path_factory.mktemp("photo"), count=1).glob("*.png"))


def upload(page, file):
    page.set_input_files("#photo input[type=file]", file)


def captions(page, column=None):
    return page.wait_for_function(CAPTIONS, arg=column).json_value()


def shares(rows, column):
    return [int(re.search(r"(\d+)%", row[column])[1]) for row in rows]


def message(page):
    text = page.wait_for_function(MESSAGE).json_value()
    page.locator(".toast-body").first.wait_for(state="detached")
    return text


def test_captions_of_an_uploaded_photo_follow_the_slider(page, photo, tmp_path):
    banner = page.locator("#banner").inner_text()
    assert "built-in demo model" in banner
    assert "1.3 M parameters, images of 32 pixels" in banner
    upload(page, photo)
    shown = captions(page)
    rows = shown["cells"]
    assert len(rows) <= 8
    assert shares(rows, 3) == sorted(shares(rows, 3), reverse=True)
    assert shown["best"] == rows[0][0]
    assert shown["maps"] == (shown["best"] if declared("word_maps") else "")
    assert "nothing about photos" in banner
    assert "The second one is " in shown["text"]
    assert sum(shares(rows, 2)) == pytest.approx(100, abs=3)
    for weight, column in (("0", 1), ("1", 2)):
        page.locator("#weight input[type=number]").fill(weight)
        page.locator("#weight input[type=number]").press("Enter")
        ordered = captions(page, column)["cells"]
        assert sorted(row[0] for row in ordered) == sorted(row[0] for row in rows)
        assert shares(ordered, column) == sorted(shares(rows, column), reverse=True)
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_labels_to_begin_with_and_the_banner_fit_the_model():
    """The photo model knows more words of shapes than of photos."""
    pytest.importorskip("gradio")
    from coca_lit.tools.demo.page import build_page

    words = ["a", "man", "dog", "circle", "square", "star", "cross", "ring"]
    blocks = build_page(create_model("coca_tiny", tokenizer=words).eval(), "photos", None).blocks.values()
    values = {block.elem_id: block.value for block in blocks if block.elem_id}
    assert values["labels"] == "man, dog"
    assert "mostly wrong" in values["banner"]
    assert "coloured shapes" not in values["banner"]


def test_labels_of_the_visitor(page, photo):
    page.get_by_role("tab", name="Classification").click()
    page.get_by_role("button", name="Classify").click()
    assert "choose a photo first" in message(page)
    upload(page, photo)
    page.locator("#labels textarea, #labels input").fill("red circle, blue star, green ring")
    page.get_by_role("button", name="Classify").click()
    page.wait_for_selector("#classes >> text=blue star")
    said = page.locator("#classes").inner_text()
    found = re.findall(r"(\d+)%", said)
    assert len(found) == 4
    assert sum(map(int, found)) == pytest.approx(100, abs=2)
    assert "none of these" in said
    page.locator("#labels textarea, #labels input").fill("circle, elephant")
    page.get_by_role("button", name="Classify").click()
    assert "no 'elephant'" in message(page)
    page.locator("#classes >> text=blue star").wait_for(state="detached")  # the old answer has gone


def test_search_by_text_and_by_photo(page, photo):
    page.get_by_role("tab", name="Search").click()
    page.locator("#query textarea, #query input").fill("a zebra")
    page.get_by_role("button", name="Search", exact=True).click()
    assert "no 'zebra'" in message(page)
    page.locator("#query textarea, #query input").fill("a large red star")
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator("#found img").nth(11).wait_for()
    page.locator("#rerank input").check()
    page.evaluate(SEE_BUTTONS)
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_function("window.seen.includes('Searching …')")  # busy, and then ready again
    page.get_by_role("button", name="Search", exact=True).wait_for()
    page.locator("#found img").nth(11).wait_for()
    upload(page, photo)
    page.locator("#photo img").wait_for()
    page.get_by_role("button", name="Images like the photo").click()
    labels = page.wait_for_function(FOUND, arg=11).json_value()
    assert not [label for label in labels if photo.stem in label]  # the photo itself
    assert labels[0].startswith("1. ")
    page.locator("#query textarea, #query input").fill("a zebra")
    page.get_by_role("button", name="Search", exact=True).click()
    assert "no 'zebra'" in message(page)
    page.locator("#found .caption-label").first.wait_for(state="detached")


def test_a_phone_scrolls_in_one_direction_only(page, photo):
    page.set_viewport_size({"width": 390, "height": 800})
    upload(page, photo)
    captions(page)
    for tab in ("Classification", "Search", "Captions"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_function("document.documentElement.scrollWidth <= 390")
        page.wait_for_function(f"({CUT})().length == 0")


def test_files_that_are_no_photo_are_refused_and_the_page_goes_on(page, photo, tmp_path):
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
    for name, content in (("drawing.svg", drawing), ("empty.png", b""), ("text.png", b"not an image")):
        (tmp_path / name).write_bytes(content)
        upload(page, tmp_path / name)
        assert f"{name} is refused: expected an intact JPEG" in message(page)
        page.locator("#photo img").wait_for(state="detached")
    upload(page, photo)
    assert captions(page)["cells"]


def test_a_model_without_decoder_says_so():
    pytest.importorskip("gradio")
    from coca_lit.tools.demo.page import build_page

    page = build_page(create_model("coca_tiny", decoder_layers=0).eval(), "clip.safetensors", None)
    texts = [str(block.value) for block in page.blocks.values() if hasattr(block, "value")]
    assert any("no decoder" in text for text in texts)
    assert any("images=FOLDER" in text for text in texts)
    assert "Write captions" not in texts
