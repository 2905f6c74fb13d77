"""Settings of a run, resolved once: command line over YAML file over preset over default."""

import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from lemoe.data.yaml_file import read_yaml
from lemoe.errors import InputError

DEFAULT_PRESET = "anchor"
LARGEST = 1 << 63  # beyond which torch and JSON's readers take no whole number

Order = Literal["planned", "file", "random"]


@dataclass(frozen=True)
class Settings:
    """How edits are planned, trained and routed.

    Attributes:
        method: how edits are taught; the preset says it.
        layer: zero-based decoder layer beside which experts stand; None takes `depth`.
        depth: relative depth of that layer, 0 to 1, where `layer` is not given.
        layer_path: path of the FFN below the layer, for models whose structure is not recognised.
        round_size: edits in a round, at most.
        order: `planned` clusters edits into rounds, `file` and `random` are for comparison.
        seed: of everything random.
        width: neurons of an expert: one a round (`paper`; None takes the base FFN's own width), or one an edit
            (`anchor`; None takes 4); the rank of `lora`'s matrices (None takes 8).
        router_width: width of the routing projection and of the keys.
        experts: how many there are in all, for `memoe`.
        top_k: experts that act on one sequence.
        steps: training steps of a round, at most.
        retries: how often edits that missed their target are trained on, for half as many steps.
        learning_rate: of AdamW for experts, whose output is scaled so that one rate fits all widths.
        router_learning_rate: of AdamW for keys and projection.
        weight_decay: of AdamW.
        loss_target: mean cross entropy of the target tokens (nats) at which a round stops early.
        noise: standard deviation of the noise on an expert's input, of RMS 1, while it is trained.
        variants: rewordings of each prompt to train on, made from the edits' own words.
        train_rephrases: train on the edits' own rephrases too; their generality is then no longer a measurement.
        negatives: other questions about an edit's subject, made from the edit file, that keep the base's answer.
        negative_weight: of the squared expert output on those.
        gate_conflict: how far a question may differ from an edit's and still be the same; 0 is strict.
        gate_slack: tokens that an open gate stays open beyond the target's length.
        norm_limit: how far any weight may move from the base's, for `ft`.
        batch_tokens: padded tokens that run through the model at once.
    """

    method: str = "anchor"
    layer: int | None = None
    depth: float = 0.5625
    layer_path: str | None = None
    round_size: int = 20
    order: Order = "planned"
    seed: int = 0
    width: int | None = None
    router_width: int = 512
    experts: int = 4
    top_k: int = 1
    steps: int = 60
    learning_rate: float = 5e-3
    router_learning_rate: float = 2e-5
    weight_decay: float = 0.0
    loss_target: float = 0.01
    retries: int = 3
    noise: float = 0.0
    variants: int = 0
    train_rephrases: bool = False
    negatives: int = 0
    negative_weight: float = 0.0
    gate_conflict: float = 3.5
    gate_slack: int = 16
    norm_limit: float = 5e-4
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        problems = [
            f"{name}: must be {bound}, not {getattr(self, name)}"
            for name, bound, holds in _BOUNDS
            if getattr(self, name) is not None and not holds(getattr(self, name))
        ]
        if self.method not in presets():
            problems.append(f"method: must be one of {', '.join(presets())}, not {self.method}")
        if problems:
            raise InputError.listing("settings out of range:", problems)

    def layer_of(self, layers: int, preset: Mapping[str, int]) -> int:
        """The layer to edit in a model of `layers`: as set, else as the model's preset says, else by depth."""
        if self.layer is not None:
            return self.layer
        return preset.get(self.method, min(layers - 1, round(self.depth * layers)))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_NOT_NEGATIVE = (
    "seed",
    "weight_decay",
    "loss_target",
    "retries",
    "noise",
    "variants",
    "negatives",
    "negative_weight",
    "gate_conflict",
    "gate_slack",
    "norm_limit",
)
_BOUNDS = (
    *((name, "at least 1", lambda value: value >= 1) for name in ("round_size", "width", "router_width", "top_k")),
    *((name, "at least 1", lambda value: value >= 1) for name in ("steps", "batch_tokens", "experts")),
    ("layer", "at least 0", lambda value: value >= 0),
    ("depth", "between 0 and 1", lambda value: 0 <= value <= 1),
    *((name, "at least 0", lambda value: value >= 0) for name in _NOT_NEGATIVE),
    *((name, "above 0, at most 1", lambda value: 0 < value <= 1) for name in ("learning_rate", "router_learning_rate")),
)


@functools.cache
def presets() -> list[str]:
    """Names of the method presets that ship with lemoe."""
    folder = resources.files("lemoe").joinpath("presets/methods")
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def resolve_settings(
    preset: str | None = None, config: Path | str | None = None, given: Mapping[str, Any] | None = None
) -> Settings:
    """One `Settings` from a preset, a YAML file and values given directly, the last being the strongest.

    Args:
        preset: a preset's name; if None, what the file's `preset:` line says, else the default one.
        config: a YAML file of `name: value` lines.
        given: values by name; those that are None are left to the weaker sources.

    Raises:
        InputError: for an unknown name (with the nearest right one) or a value of the wrong type or range.
    """
    from_file = _read_config(Path(config)) if config is not None else {}
    if "method" in from_file:
        raise InputError(f"{config}: `method` is the preset's to say; write `preset: {_brief(from_file['method'])}`")
    filed = from_file.pop("preset", None)
    preset = preset or filed or DEFAULT_PRESET
    if preset not in presets():
        raise InputError(f"preset {_brief(preset)} is not known; there is: {', '.join(presets())}")
    from_preset = yaml.safe_load(resources.files("lemoe").joinpath(f"presets/methods/{preset}.yaml").read_text())
    direct = {name: value for name, value in (given or {}).items() if value is not None}
    layers = ((f"preset {preset}", from_preset), (str(config), from_file), ("given settings", direct))
    merged: dict[str, Any] = {}
    for place, values in layers:
        merged.update(coerce_settings(place, values))
    return Settings(**merged)


def _read_config(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `name: value` lines")
    return {str(name): value for name, value in values.items()}


def coerce_settings(place: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the types that `Settings` declares (PyYAML reads `1e-4` as text).

    Raises:
        InputError: naming every value that does not fit, and the nearest right name of every unknown one.
    """
    hints = typing.get_type_hints(Settings)
    known = {field.name for field in fields(Settings)}
    coerced: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            problems.append(f"{name:.60}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        try:
            coerced[name] = _coerce(value, hints[name])
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{name}: {_brief(value)} is not {_expected(hints[name])}")
    if problems:
        raise InputError.listing(f"{place}: {len(problems)} bad setting(s)", problems)
    return coerced


def _coerce(value: Any, hint: Any) -> Any:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value not in options:
            raise ValueError
        return value
    if isinstance(hint, types.UnionType):
        return None if value is None else _coerce(value, next(o for o in options if o is not type(None)))
    if isinstance(value, bool) != (hint is bool):
        raise TypeError
    if hint is int:
        return _whole(value)
    if hint is str and not isinstance(value, str):
        raise TypeError
    if hint is float and not math.isfinite(float(value)):
        raise ValueError
    return hint(value)


def _whole(value: Any) -> int:
    number = value if isinstance(value, int) else int(float(value))
    if abs(number) >= LARGEST or (number != value and number != float(value)):
        raise ValueError
    return number


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


def _brief(value: Any) -> str:
    """A value for a message; YAML's aliases make values that would fill the memory when written in full."""
    if isinstance(value, int) and abs(value) >= LARGEST:
        return "a number of so many digits"
    return _SHORT.repr(value)


def _expected(hint: Any) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, options))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return " or ".join(names.get(option, str(option)) for option in (options or (hint,)))
