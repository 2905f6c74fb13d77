"""Settings of a run, resolved once: command line over YAML file over preset over default."""

import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from lemoe.data.counting import format_count
from lemoe.data.yaml_file import read_yaml
from lemoe.errors import InputError

DEFAULT_PRESET = "anchor"
INTEGER_LIMIT = 1 << 63  # torch and JSON readers take no larger whole numbers

Order = Literal["planned", "file", "random"]
GateEvidence = Literal["words", "meaning"]


@dataclass(frozen=True)
class Settings:
    """How edits are planned, trained and routed; `Settings()` is preset `anchor`, and each default a value of it.

    `resolve_settings` reads other presets and files. Its `repr` names what differs from the defaults.

    Attributes:
        method: how edits are trained; set by the preset.
        layer: zero-based decoder layer to whose FFN the experts are added; None takes `depth`.
        depth: relative depth of that layer, 0 to 1, where `layer` is not given.
        layer_path: path of the FFN inside the layer, for models whose structure is not recognised.
        round_size: edits per round, at most.
        order: `planned` clusters edits into rounds, `file` and `random` are for comparison.
        seed: of everything random.
        width: neurons of an expert: one per round (`paper`; None takes the base FFN's own width), or one per edit
            (`anchor`; None takes 4, and more for answers of more than 16 tokens); the rank of `lora`'s matrices (None
            takes 8).
        router_width: width of the routing projection and of the keys.
        experts: total number of experts, for `memoe`.
        top_k: experts that act on one sequence.
        steps: training steps per round, at most.
        retries: how often edits that miss their target are trained further, for half as many steps each time, and the
            first time those that a paraphrase missed; 0 for never, else those that still miss are trained by their own
            prompt alone in the end.
        learning_rate: of AdamW for experts, whose output is scaled so that one rate fits all widths.
        router_learning_rate: of AdamW for keys and projection.
        weight_decay: of AdamW.
        loss_target: mean cross entropy of the target tokens (nats) at which a round stops early.
        noise: standard deviation of the noise on an expert's input, of RMS 1, while it is trained.
        variants: synthetic paraphrases per prompt to train on, from the bank of questions and the edits' own words.
        train_rephrases: train on the edits' own rephrases too; their generality is then no longer a measurement.
        negatives: negative prompts per edit: synthetic other questions about its subject, which keep the base's answer.
        negative_weight: weight of the squared expert output on those, and in phrases before their answer is due.
        gate: what tells whether a text asks for an edit: its `words`, or `meaning` too, as the base model itself reads
            it.
        gate_probability: that a text asks for an edit, from which the edit's gate opens, by meaning.
        gate_conflict: how far the words of a question may differ from an edit's and still open its gate, where words
            alone decide; 0 is strict.
        gate_slack: tokens that an open gate stays open beyond the target's length.
        norm_limit: how far any weight may move from the base's, for `ft` and `rect`.
        change_share: share of a round's changes of weights that stays, the largest relative to the weight, for `rect`.
        demonstrations: other edits, as new facts and their answers, in front of the fact, for `context` and `rag`.
        retrieval_threshold: cosine of a prompt and a fact from which the fact is put in front of it, for `rag`.
        merge_share: how far weights go from those before a round towards those it trained, for `lora-merge`.
        radius: Euclidean distance up to which what an FFN reads counts as an edit's, for `grace`.
        batch_tokens: padded tokens per batch.

    Example:
        >>> import lemoe
        >>> settings = lemoe.Settings(steps=8)
        >>> settings.round_size
        50
        >>> settings
        Settings(steps=8)
    """

    method: str = DEFAULT_PRESET
    layer: int | None = None
    depth: float = 0.72
    layer_path: str | None = None
    round_size: int = 50
    order: Order = "planned"
    seed: int = 0
    width: int | None = None
    router_width: int = 512
    experts: int = 4
    top_k: int = 1
    steps: int = 16
    learning_rate: float = 5e-3
    router_learning_rate: float = 2e-5
    weight_decay: float = 0.0
    loss_target: float = 0.1
    retries: int = 3
    noise: float = 0.5
    variants: int = 3
    train_rephrases: bool = False
    negatives: int = 0
    negative_weight: float = 3.0
    gate: GateEvidence = "meaning"
    gate_probability: float = 0.5
    gate_conflict: float = 3.5
    gate_slack: int = 16
    norm_limit: float = 5e-4
    change_share: float = 1.0
    demonstrations: int = 0
    retrieval_threshold: float = 0.0
    merge_share: float = 1.0
    radius: float = 1.0
    batch_tokens: int = 2048

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return f"Settings({', '.join(f'{name}={value!r}' for name, value, usual in values if value != usual)})"

    def __post_init__(self) -> None:
        problems = [
            f"{name}: must be {bound}, not {getattr(self, name)}"
            for name, bound, is_valid in _BOUNDS
            if getattr(self, name) is not None and not is_valid(getattr(self, name))
        ]
        if self.method not in preset_names():
            problems.append(f"method: must be one of {', '.join(preset_names())}, not {self.method}")
        if problems:
            raise InputError.from_problems("settings out of range:", problems)

    def resolve_layer(self, layer_count: int, preset: Mapping[str, int]) -> int:
        """The layer to edit in a model of `layer_count` layers: `layer`, else the model's preset, else by `depth`."""
        if self.layer is not None:
            return self.layer
        return preset.get(self.method, min(layer_count - 1, round(self.depth * layer_count)))

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
    "demonstrations",
    "retrieval_threshold",
    "radius",
)
_BOUNDS = (
    *((name, "at least 1", lambda value: value >= 1) for name in ("round_size", "width", "router_width", "top_k")),
    *((name, "at least 1", lambda value: value >= 1) for name in ("steps", "batch_tokens", "experts")),
    ("layer", "at least 0", lambda value: value >= 0),
    ("depth", "between 0 and 1", lambda value: 0 <= value <= 1),
    *((name, "at least 0", lambda value: value >= 0) for name in _NOT_NEGATIVE),
    ("gate_probability", "above 0, below 1", lambda value: 0 < value < 1),
    *((name, "above 0, at most 1", lambda value: 0 < value <= 1) for name in ("learning_rate", "router_learning_rate")),
    *((name, "above 0, at most 1", lambda value: 0 < value <= 1) for name in ("change_share", "merge_share")),
)


@functools.cache
def preset_names() -> list[str]:
    """Names of the method presets that ship with lemoe."""
    folder = resources.files("lemoe").joinpath("presets/methods")
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def resolve_settings(
    preset: str | None = None, config: Path | str | None = None, given: Mapping[str, Any] | None = None
) -> Settings:
    """One `Settings` from a preset, a YAML file and values given directly; later sources override earlier ones.

    Args:
        preset: a preset's name; if None, the file's `preset:` line, else the default one.
        config: a YAML file of `name: value` lines.
        given: values by name; None leaves a value to the earlier sources.

    Raises:
        InputError: for an unknown name (with the nearest right one) or a value of the wrong type or range.

    Example:
        >>> import lemoe
        >>> lemoe.resolve_settings("paper", given={"seed": 7}).round_size
        20
        >>> lemoe.resolve_settings() == lemoe.Settings()
        True
    """
    from_file = _read_config(Path(config)) if config is not None else {}
    if "method" in from_file:
        method = _shorten_value(from_file["method"])
        raise InputError(f"{config}: `method` is set by the preset; write `preset: {method}`")
    preset_in_file = from_file.pop("preset", None)
    preset = preset or preset_in_file or DEFAULT_PRESET
    if preset not in preset_names():
        raise InputError(f"preset {_shorten_value(preset)} is not known; there is: {', '.join(preset_names())}")
    from_preset = yaml.safe_load(resources.files("lemoe").joinpath(f"presets/methods/{preset}.yaml").read_text())
    direct = {name: value for name, value in (given or {}).items() if value is not None}
    sources = ((f"preset {preset}", from_preset), (str(config), from_file), ("given settings", direct))
    merged: dict[str, Any] = {}
    for source, values in sources:
        merged.update(coerce_settings(source, values))
    return Settings(**merged)


def vary_settings(settings: Settings, varied: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """`settings` with each combination of the values of `varied`, the last name's changing fastest.

    Raises:
        InputError: for an unknown name (with the nearest right one) or a value of the wrong type or range.
    """
    combinations = [dict(zip(varied, values, strict=True)) for values in product(*varied.values())]
    return [replace(settings, **coerce_settings("varied settings", given)) for given in combinations]


def _read_config(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `name: value` lines")
    return {str(name): value for name, value in values.items()}


def coerce_settings(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, which come from `source`, with the types that `Settings` declares (PyYAML reads `1e-4` as text).

    Raises:
        InputError: naming every value that does not fit, and the nearest right name of every unknown one.
    """
    hints = typing.get_type_hints(Settings)
    names = {field.name for field in fields(Settings)}
    coerced: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        if name not in names:
            nearest = difflib.get_close_matches(name, names, 1)
            problems.append(f"{name:.60}: no such setting" + (f"; did you mean {nearest[0]}?" if nearest else ""))
            continue
        try:
            coerced[name] = _coerce_value(value, hints[name])
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{name}: {_shorten_value(value)} is not {_describe_type(hints[name])}")
    if problems:
        raise InputError.from_problems(f"{source}: {format_count(len(problems), 'bad setting')}", problems)
    return coerced


def _coerce_value(value: Any, hint: Any) -> Any:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value not in options:
            raise ValueError
        return value
    if isinstance(hint, types.UnionType):
        return None if value is None else _coerce_value(value, next(o for o in options if o is not type(None)))
    if isinstance(value, bool) != (hint is bool):
        raise TypeError
    if hint is int:
        return _coerce_integer(value)
    if hint is str and not isinstance(value, str):
        raise TypeError
    if hint is float and not math.isfinite(float(value)):
        raise ValueError
    return hint(value)


def _coerce_integer(value: Any) -> int:
    number = value if isinstance(value, int) else int(float(value))
    if abs(number) >= INTEGER_LIMIT or (number != value and number != float(value)):
        raise ValueError
    return number


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


def _shorten_value(value: Any) -> str:
    """A value shortened for a message; YAML aliases can make values that would fill the memory in full."""
    if isinstance(value, int) and abs(value) >= INTEGER_LIMIT:
        return "a number of so many digits"
    return _SHORT.repr(value)


def _describe_type(hint: Any) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, options))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return " or ".join(names.get(option, str(option)) for option in (options or (hint,)))
