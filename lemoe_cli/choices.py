"""Names of presets and models as types of options: near misses are named, and shells complete them."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from lemoe.errors import InputError


def complete_names(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """The names that begin so."""
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class PresetName(click.ParamType[str]):
    """A preset of those that a command takes: all, or those whose rounds can be stacked."""

    name = "PRESET"

    def __init__(self, *, baselines: bool):
        self._baselines = baselines

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from lemoe.settings import resolve_settings
        from lemoe.training.methods import METHODS, check_adds_experts

        if value in METHODS and value not in self.names():
            check_adds_experts(resolve_settings(value))
        return check_preset(str(value), self.names())

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return complete_names(self.names(), incomplete)

    def names(self) -> list[str]:
        """The presets that are taken."""
        from lemoe.training.methods import METHODS

        return sorted(name for name, method in METHODS.items() if self._baselines or not method.baseline)


class PresetNames(PresetName):
    """Several presets, with commas between them."""

    name = "PRESET,PRESET"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        chosen = dict.fromkeys(name.strip() for name in str(value).split(",") if name.strip())
        if not chosen:
            self.fail("names no preset", param, ctx)
        return ",".join(check_preset(name, self.names()) for name in chosen)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{found.value}") for found in complete_names(self.names(), last)]


class ModelName(click.ParamType[str]):
    """A model's preset, folder or hub id; what it means is checked later, with --revision."""

    name = "MODEL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from lemoe.base.sources import model_presets

        return [*complete_names(sorted(model_presets()), incomplete), CompletionItem(incomplete, type="dir")]


class AdaptorName(click.Path):
    """An adaptor's file or folder, or `org/name[@revision]` on the hub, from where it is downloaded."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if ctx is None or not ctx.resilient_parsing:
            value = find_adaptor(str(value))
        return super().convert(value, param, ctx)


def find_adaptor(name: str) -> Path:
    """The local path of an adaptor, which is downloaded first if it is on the hub.

    Raises:
        AdaptorError: if it cannot be had from there.
    """
    if "/" not in name:
        return Path(name)
    from lemoe.adaptor.hub import fetch_adaptor, parse_hub_id

    on_hub = parse_hub_id(name)
    return fetch_adaptor(*on_hub) if on_hub else Path(name)


def check_preset(name: str, names: list[str]) -> str:
    """`name`, if there is such a preset.

    Raises:
        InputError: with the nearest of `names`, and all of them.
    """
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, 1)
    hint = f", did you mean {nearest[0]}?" if nearest else ";"
    raise InputError(f"preset {name:.60} is not known{hint} there is: {', '.join(names)}")
