"""What MkDocs is told beyond mkdocs.yml: the pages lie all over the repository, and link to files that are no pages.

The Markdown files keep the links that a forge follows. Here each page becomes a page of the site at the same path, each
file that a page links to is copied, and a link to a folder leads to its README, if it has one. The page of all keys is
generated.
"""

import re
from pathlib import Path

import key_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "outputs", "coca_lit/**", "conf/**", "experiments/**")
LINK = re.compile(r"""(\]\(|<img src=")([^)\s"#:]+)(?=[)#"])""")
FOLDER_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md")}
    linked = {
        target
        for page in pages
        for _, link in LINK.findall(page.read_text())
        if (target := (page.parent / link).resolve()).is_file() and target.is_relative_to(ROOT)
    }
    for path in sorted(pages | linked):
        source = path.relative_to(ROOT).as_posix()
        place = (str(ROOT), config.site_dir, config.use_directory_urls)
        files.append(File(source, *place, inclusion=InclusionLevel.INCLUDED))  # also below a hidden folder
    files.append(File.generated(config, "conf/KEYS.md", content=key_reference.reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    markdown = with_pages(indented(markdown), (ROOT / page.file.src_uri).parent)
    return markdown.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")  # in the cells of tables


def indented(markdown: str) -> str:
    """The text with four spaces in place of two before what is inside of a list item, as Python-Markdown wants it."""
    lines, in_block = [], False
    for line in markdown.split("\n"):
        in_block ^= line.startswith("```")
        lines.append(f"  {line}" if line.startswith("  ") and not in_block else line)
    return "\n".join(lines)


def with_pages(markdown: str, folder: Path) -> str:
    """The text of a page in `folder`, whose links to folders lead to their README; code is not on the site."""

    def to_page(link: re.Match[str]) -> str:
        if not (folder / link[2]).is_dir():
            return link[0]
        has_page = (folder / link[2] / "README.md").is_file()
        return f"[{link[1]}]({link[2].rstrip('/')}/README.md)" if has_page else link[1]

    return FOLDER_LINK.sub(to_page, markdown)
