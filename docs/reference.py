"""Writes the tables of settings.md and commands.md from the code: `python docs/reference.py`.

A page names a table by `<!-- generated: NAME -->`; what stands between that and `<!-- end -->` is replaced. A test
compares the pages with what this program would write.
"""

import html
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click

from lemoe.settings import Settings, preset_names, resolve_settings
from lemoe_cli.main import cli

FOLDER = Path(__file__).resolve().parent
PAGES = ("commands.md", "settings.md")
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def describe_settings() -> dict[str, str]:
    """What the docstring of `Settings` says of each setting."""
    lines = inspect.cleandoc(Settings.__doc__ or "").partition("Attributes:\n")[2]
    return {name: " ".join(text.split()) for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", lines, re.M)}


def list_options() -> dict[str, list[click.Option]]:
    """The options of each command that `--help` shows."""
    context = click.Context(cli)
    found = {}
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        found[name] = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    return found


def render_settings() -> str:
    """Every setting with its default, its option of `lemoe edit` and what it does."""
    meanings = describe_settings()
    options = {option.name: option.opts[0] for option in list_options()["edit"]}
    rows = []
    for field in fields(Settings):
        assert field.default is not MISSING
        option = f"`{options[field.name]}`" if field.name in options else ""
        rows.append((f"`{field.name}`", f"`{_show_value(field.default)}`", option, meanings[field.name]))
    return _render_table(("setting", "default", "option", ""), rows)


def render_presets() -> str:
    """What each preset sets that is not the default."""
    presets = {name: resolve_settings(name) for name in preset_names()}
    rows = []
    for field in fields(Settings):
        values = [getattr(settings, field.name) for settings in presets.values()]
        if field.name != "method" and any(value != field.default for value in values):
            rows.append((f"`{field.name}`", *("" if v == field.default else _show_value(v) for v in values)))
    return _render_table(("setting", *(f"`{name}`" for name in presets)), rows)


def render_options() -> str:
    """Every option of every command, as its help has it."""
    parts = []
    for name, options in list_options().items():
        context = click.Context(cli.get_command(click.Context(cli), name) or cli, info_name=name)
        rows = []
        for option in options:
            record = option.get_help_record(context)
            if record is not None:
                rows.append((_as_code(record[0]), _escape(" ".join(record[1].split()))))
        parts.append(f"### `lemoe {name}`\n\n{_render_table(('option', ''), rows)}")
    return "\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    "settings": render_settings,
    "presets": render_presets,
    "options": render_options,
}


def render_page(text: str) -> str:
    """A page with its tables as the code has them."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def _show_value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def _as_code(text: str) -> str:
    """Code in a cell of a table: backticks do not keep a `|` together everywhere."""
    return f"<code>{_escape(text)}</code>"


def _escape(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;")


def _render_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


if __name__ == "__main__":
    for page in PAGES:
        path = FOLDER / page
        path.write_text(render_page(path.read_text(encoding="utf-8")), encoding="utf-8")
