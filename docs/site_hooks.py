"""Hooks of mkdocs: files of the repository that pages link to become files of the site.

On GitHub `[edits](../examples/edits.jsonl)` leads to the file; on the site it leads to a copy, so that every link is
checked and none needs the repository's address.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "repository"
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to outside of `docs/`."""
    linked = {target for page in files.documentation_pages() for target in _LINK.findall(page.content_string)}
    for target in sorted(linked):
        if (ROOT / target).is_file():  # else mkdocs warns of the link
            files.append(File.generated(config, _name_copy(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links outside of `docs/` lead to the copies."""
    return _LINK.sub(lambda found: f"]({_name_copy(found[1])}", markdown)


def _name_copy(target: str) -> str:
    """Browsers show text; Python, YAML and JSON Lines they would store. Markdown would become a page."""
    return f"{FOLDER}/{target}" if target.endswith(".txt") else f"{FOLDER}/{target}.txt"
