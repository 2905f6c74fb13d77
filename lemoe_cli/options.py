"""Options that several subcommands share, and how they become the library's objects."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe_cli.choices import AdaptorName, ModelName, PresetName
from lemoe_cli.command import Command, options_of, settings_of
from lemoe_cli.timing import start_clock, start_phase

if TYPE_CHECKING:
    from lemoe.adaptor.checkpoint import AdaptorFile
    from lemoe.adaptor.state import AdaptorState
    from lemoe.base.loading import BaseModel
    from lemoe.data.edits import Edit
    from lemoe.settings import Settings

FILE = click.Path(path_type=Path)


AUTO = "auto"


class LayerChoice(click.ParamType[int | str]):
    """A layer's number, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == AUTO:
            return AUTO
        try:
            number = int(value)
        except ValueError:
            number = -1
        if number < 0:
            self.fail(f"{value!r} is neither a layer's number, from 0, nor auto", param, ctx)
        return number


class Size(click.ParamType[int]):
    """Bytes, as a number with K, M, G or T behind it."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        if not found:
            self.fail(f"{value!r} is no size; expected one like 64M or 2G", param, ctx)
        return int(float(found[1]) * 1024 ** " KMGT".find(found[2].upper() or " "))


def combine_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator for several options, shown in the given order."""

    def add_options(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add_options


ADAPTOR = AdaptorName()

edits_argument = click.argument("edits", type=FILE)
adaptors_argument = click.argument("adaptors", type=ADAPTOR, nargs=-1, required=True, metavar="ADAPTOR...")
model_argument = click.argument("model", type=ModelName())

model_option = options_of("Model")
edits_option = options_of("Edits")
training_option = options_of("Training")
setting_option = settings_of("Training")
adaptor_option = options_of("Adaptor")
measuring_option = options_of("Measuring")
output_option = options_of("Output")

_MODEL_HELP = "Preset name (llama = embedded), folder, or org/name[@rev]."
_device_option = model_option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
_device_map_option = model_option(
    "--device-map",
    type=click.Choice(["auto", "balanced", "sequential"]),
    help="For a model larger than a GPU: over all of them, main memory and disk.",
)
_source_options: Callable[[Any], Any] = combine_options(
    model_option("--revision", help="Branch, tag or commit of a hub model."),
    model_option("--trust-remote-code", is_flag=True, help="Run model code that the repository brings."),
)
_loading_options: Callable[[Any], Any] = combine_options(
    _device_option,
    _device_map_option,
    model_option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16, float16."),
    _source_options,
)
model_options = combine_options(
    model_option("--model", "-m", type=ModelName(), required=True, help=_MODEL_HELP), _loading_options
)
model_options_if_any = combine_options(
    model_option("--model", "-m", type=ModelName(), help=_MODEL_HELP), _loading_options
)
model_options_without_dtype = combine_options(
    model_option("--model", "-m", type=ModelName(), required=True, help=_MODEL_HELP), _device_option, _source_options
)  # where --dtype means something else
placing_options = combine_options(_device_option, _source_options)  # where the model is an argument

selection_options: Callable[[Any], Any] = combine_options(
    edits_option("--limit", type=click.IntRange(1), help="Only the first N edits."),
    edits_option("--sample", type=click.IntRange(1), help="Only S of them, drawn with --seed."),
    edits_option("--seed", type=click.IntRange(0), help="Of everything random.  [default: 0]"),
)


def _make_preset_option(help_text: str, *, baselines: bool) -> Callable[[Command], Command]:
    taken = PresetName(baselines=baselines)
    return training_option("--preset", type=taken, help=f"{help_text}  [default: anchor]")


_config_option = training_option(
    "--config", type=FILE, help="YAML file of `name: value` settings; options win over it."
)
preset_options: Callable[[Any], Any] = combine_options(
    _make_preset_option("Method preset: anchor or paper.", baselines=False), _config_option
)
any_preset_options: Callable[[Any], Any] = combine_options(
    _make_preset_option("Method preset: anchor, paper or a baseline.", baselines=True), _config_option
)
settings_options: Callable[[Any], Any] = combine_options(
    preset_options,
    setting_option("--order", type=click.Choice(["planned", "file", "random"]), help="How rounds are formed."),
    setting_option("--round-size", type=click.IntRange(1), help="Edits in a round, at most."),
)

decode_option = measuring_option(
    "--decode",
    type=click.Choice(["teacher", "greedy"]),
    default="teacher",
    show_default=True,
    help="Likeliest token at each position of the target, or what the model writes.",
)
batch_tokens_option = measuring_option(
    "--batch-tokens",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Tokens that run through the model at once.",
)
report_option = output_option(
    "--report", "reports", type=FILE, multiple=True, help="Write a page (.html) or Markdown (.md); repeatable."
)
json_option = output_option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")

expert_cache_option = adaptor_option(
    "--expert-cache", type=Size(), help="Keep this much of the experts in memory, as 64M; the others stay in the file."
)
mismatch_option = adaptor_option(
    "--allow-base-mismatch", is_flag=True, help="Take an adaptor of another base model, if it fits at all."
)


def conflict_option(help_text: str) -> Callable[[Command], Command]:
    """`--on-conflict`: which of several edits with one question answers."""
    choices = click.Choice(["latest", "error", "keep", "both"])
    return adaptor_option("--on-conflict", type=choices, default="latest", show_default=True, help=help_text)


merging_options: Callable[[Any], Any] = combine_options(
    conflict_option("Which edit answers where several adaptors answer the same question; keep takes the earliest."),
    adaptor_option(
        "--drop",
        multiple=True,
        metavar="ROUND|EDIT|ROUND/EDIT",
        help="Take out a round, by number or id, or an edit, by id or digest.  [several]",
    ),
    adaptor_option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Store experts so.  [default: as they are]",
    ),
)

progress_options: Callable[[Any], Any] = combine_options(
    output_option("--quiet", "-q", is_flag=True, help="No progress, only results and errors."),
    output_option(
        "--verbose",
        "-v",
        is_flag=True,
        expose_value=False,
        callback=start_clock,
        help="Say how long each phase took.",
    ),
)
force_option = output_option("--force", is_flag=True, help="Replace what is there.")


def make_loader(options: Mapping[str, Any]) -> "Callable[..., BaseModel]":
    """A function that loads the model of the model options, on any machine with the same folders; see `load_base`."""
    from lemoe.base.loading import load_base

    name = options["model"]
    return partial(
        load_base,
        str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        dtype=options["dtype"],
        revision=options["revision"],
        trust_remote_code=options["trust_remote_code"],
    )


def open_base(options: Mapping[str, Any], *, quiet: bool) -> "BaseModel":
    """The base model that the model options name."""
    from lemoe.base.loading import load_base
    from lemoe_cli.ui import show_stage

    with show_stage("loading the model", quiet=quiet) as notify:
        return load_base(
            options["model"],
            device=options["device"],
            device_map=options["device_map"],
            dtype=options["dtype"],
            revision=options["revision"],
            trust_remote_code=options["trust_remote_code"],
            notify=notify,
        )


def check_inputs(adaptors: Sequence[Path | None], options: Mapping[str, Any], *, quiet: bool) -> None:
    """Refuse what is no adaptor, and a model's name that means nothing; says on stderr what the name meant.

    Commands import what loads torch only after this.
    """
    from lemoe.adaptor.header import check_adaptor
    from lemoe.base.sources import resolve_model

    for adaptor in adaptors:
        if adaptor is not None:
            check_adaptor(adaptor)
    source = resolve_model(options["model"], options["revision"]) if options["model"] else None
    if source and not quiet:
        click.echo(f"model: {source}", err=True)
    start_phase("importing torch and transformers")


def check_cache(adaptor: Path | None, options: Mapping[str, Any]) -> None:
    """Refuse --expert-cache where there are no experts."""
    if options["expert_cache"] is not None and adaptor is None:
        raise click.UsageError("--expert-cache needs an --adaptor, whose experts stay in its file")


def open_adaptor(path: Path) -> "AdaptorFile":
    """The adaptor file at `path`, found to be whole."""
    from lemoe.adaptor.checkpoint import AdaptorFile

    file = AdaptorFile(path)
    file.check_hash()
    return file


def check_match(base: "BaseModel", state: "AdaptorState", *, allow: bool) -> tuple[str, ...]:
    """How `base` differs from that which an adaptor was made for: refused, or where that is allowed, said on stderr."""
    from lemoe.adaptor.state import check_base
    from lemoe_cli.ui import print_note

    differences = check_base(base, state, allow=allow)
    for difference in differences:
        print_note(f"warning: another base than the adaptor was made for: {difference}")
    return differences


def open_edits(path: Path, options: Mapping[str, Any]) -> "list[Edit]":
    """The edits that the selection options leave."""
    from lemoe.data.edits import read_edits, sample_edits

    return sample_edits(read_edits(path), options["limit"], options["sample"], options["seed"] or 0)


def settings_from(options: Mapping[str, Any], names: tuple[str, ...]) -> "Settings":
    """Settings from the options called `names`, the YAML file and the preset."""
    from lemoe.settings import resolve_settings

    given = {name: options.get(name) for name in names}
    return resolve_settings(options["preset"], options["config"], given)
