"""Reading the documents: their code blocks with the marks in front of them, their headings and their links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conftest import REPOSITORY

DOCUMENTS = (
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
)
SHELLS = {"sh", "bash", "console"}
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[\w: ]+) -->\n)?(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A code block, with what stands in the comment in front of it, as `tested: pipeline`."""

    page: str
    mark: str
    language: str
    code: str

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block; of `console` blocks, what stands behind `$`."""
        lines = self.code.replace("\\\n", " ").splitlines()
        if self.language == "console":
            return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line.strip() for line in lines if line.strip()]


@cache
def read_document(page: str) -> str:
    """A page by its path in the repository."""
    return (REPOSITORY / page).read_text(encoding="utf-8")


def name_document(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@cache
def list_blocks(page: str) -> list[Block]:
    """The code blocks of a page, in order."""
    return [
        Block(page, found["mark"] or "", found["language"], found["code"])
        for found in _BLOCK.finditer(read_document(page))
    ]


def find_block(page: str, mark: str) -> Block:
    """The one block of a page with this mark."""
    (block,) = [block for block in list_blocks(page) if block.mark == mark]
    return block


def list_anchors(page: str) -> set[str]:
    """The names of the headings of a page, as links give them."""
    text = re.sub(r"^ *```.*?^ *```$", "", read_document(page), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def list_links(page: str) -> list[tuple[str, str]]:
    """Target and anchor of every relative link of a page; the target of a link into the page is empty."""
    text = re.sub(r"^ *```.*?^ *```$", "", read_document(page), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]*)\)", text)
    return [link.partition("#")[::2] for link in links if not link.startswith(("http:", "https:"))]


def list_lemoe_commands(page: str, mark: str | None = None) -> Iterator[list[str]]:
    """The `lemoe` commands in the shell blocks of a page, or those with a mark, as words without redirections.

    Those that a shell has to complete are left out.
    """
    for block in list_blocks(page):
        if block.language in SHELLS and mark in (None, block.mark):
            for command in block.commands:
                for part in re.split(r" \| | && ", command):
                    if part.startswith("lemoe ") and "$" not in part:
                        yield shlex.split(part.partition(" > ")[0], comments=True)[1:]


def list_inline_commands(page: str) -> list[str]:
    """The `lemoe` commands in the running text of a page."""
    text = re.sub(r"^ *```.*?^ *```$", "", read_document(page), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`lemoe ([a-z][^`]*)`", text)
