"""What all subcommands share: `--help` with options by section and examples, and where old spellings have gone."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import click

from lemoe.errors import InputError

_ARGUMENTS = "lemoe.arguments"  # of the subcommand, in click's context
OTHER = "Other"  # the section of options that name none

Command = TypeVar("Command", bound=Callable[..., Any])


class SectionOption(click.Option):
    """An option that `--help` shows under the heading `section`."""

    def __init__(self, *declared: Any, section: str, **attributes: Any):
        super().__init__(*declared, **attributes)
        self.section = section


class SettingOption(SectionOption):
    """An option for a setting, whose default is what the preset on the command line says."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        from lemoe.settings import resolve_settings

        extra = super().get_help_extra(ctx)
        value = getattr(resolve_settings(_named_preset(ctx.meta.get(_ARGUMENTS, ()))), self.name or "")
        return {**extra, "default": f"{value}"} if value is not None and value is not False else extra


class OptionMaker(Protocol):
    """`click.option`."""

    def __call__(self, *declared: str, **attributes: Any) -> Callable[[Command], Command]: ...


def options_of(section: str) -> OptionMaker:
    """`click.option` for the options of a section."""
    return partial(click.option, cls=SectionOption, section=section)


def settings_of(section: str) -> OptionMaker:
    """`click.option` for the settings of a section."""
    return partial(click.option, cls=SettingOption, section=section, default=None)


@dataclass(frozen=True)
class Moved:
    """An option that has become a command; `renamed` is its option for the same value, None for a flag."""

    command: str
    renamed: str | None = None


class LemoeCommand(click.Command):
    """A subcommand with options by section, examples, and options that have become commands."""

    def __init__(
        self, *args: Any, examples: Sequence[str] = (), moved: Mapping[str, Moved] | None = None, **attributes: Any
    ):
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)
        self.moved = dict(moved or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = tuple(args)
        for position, word in enumerate(args):
            name = word.partition("=")[0]
            if name in self.moved:
                raise InputError(f"`lemoe {self.name} {name}` is now: {_respell(self.moved[name], args, position)}")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "section", OTHER), []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")


def lemoe_command(
    name: str, *, examples: Sequence[str], moved: Mapping[str, Moved] | None = None
) -> Callable[[Callable[..., Any]], LemoeCommand]:
    """`click.command` for a subcommand."""
    return click.command(name, cls=LemoeCommand, examples=examples, moved=moved)


def _respell(moved: Moved, args: Sequence[str], position: int) -> str:
    """The command line in the new spelling."""
    _, equals, value = args[position].partition("=")
    words = [] if moved.renamed is None else [moved.renamed, *([value] if equals else [])]
    return shlex.join(["lemoe", moved.command, *args[:position], *words, *args[position + 1 :]])


def _named_preset(arguments: Sequence[str]) -> str | None:
    """The preset that the arguments name."""
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name == "--preset":
            return value if equals else following
    return None
