"""The site of the pages: nothing in it is dead, and what the pages leave to a forge works there too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytestmark = pytest.mark.slow  # builds all pages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = ("-m", "mkdocs", "build", "-q", "--strict", "-f", ROOT / ".docs" / "mkdocs.yml", "-d", folder)
    command = (sys.executable, *build)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_are_where_their_folders_are(site: Path) -> None:
    for page in ("index.html", "conf/KEYS/index.html", "experiments/two_cores/index.html"):
        assert (site / page).is_file(), page
    assert (site / "experiments/demo/samples.png").read_bytes() == (ROOT / "experiments/demo/samples.png").read_bytes()


def test_links_to_files_and_folders_lead_somewhere(site: Path) -> None:
    """Strict mode checks links between pages only."""
    for page in site.rglob("index.html"):
        for link in re.findall(r'(?:href|src)="([^":#?]+)[#"]', page.read_text()):
            assert link.startswith("/") or (page.parent / link).exists(), f"{page.relative_to(site)}: {link}"


def test_the_stable_names_are_documented(site: Path) -> None:
    import coca_lit

    page = (site / "api/index.html").read_text()
    assert [name for name in coca_lit.__all__ if f">coca_lit.{name}<" not in re.sub(r"\s", "", page)] == []
