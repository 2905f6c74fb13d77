"""Adaptor files: one safetensors file is one state, written whole or not at all, read with every check.

All metadata is sorted JSON under one key, so that saving is deterministic: equal states give
byte-identical files.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lemoe import __version__
from lemoe.adaptor.experts import Experts
from lemoe.adaptor.header import FIRST_WITH_MEANING, FORMAT, METADATA_KEY, adaptor_path, open_safetensors, read_header
from lemoe.adaptor.state import AdaptorState, RoundRecord
from lemoe.adaptor.tensor_file import TensorEntry, matches_stored_hash, stored_tensors, write_tensors
from lemoe.base.fingerprint import Fingerprint
from lemoe.errors import AdaptorError, InputError
from lemoe.routing.registry import ROUTERS
from lemoe.routing.router import are_valid_offsets
from lemoe.settings import Settings, coerce_settings

MATRICES = ("experts.up", "experts.down", "experts.gate")

Record = TypeVar("Record", Fingerprint, RoundRecord)


def save_adaptor(state: AdaptorState, path: Path | str, *, overwrite: bool = False) -> None:
    """Write `state` to `path`, whole or not at all.

    Raises:
        AdaptorError: if the state holds values that are not finite, which no file may.
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.

    Example:
        >>> import lemoe
        >>> state = lemoe.load_adaptor("edits.lemoe")
        >>> lemoe.save_adaptor(state.drop_experts([0]), "fewer.safetensors")
        >>> len(lemoe.load_adaptor("fewer.safetensors").edits) == len(state.edits) - 1
        True
    """
    broken = [
        name for name, t in state_tensors(state).items() if t.is_floating_point() and not bool(t.isfinite().all())
    ]
    if broken:
        raise AdaptorError(f"{path}: not written, these hold values that are not finite: {', '.join(broken)}")
    matrices = {name: TensorEntry.from_tensor(matrix) for name, matrix in expert_matrices(state).items()}
    write_adaptor(state, matrices, path, overwrite=overwrite)


def write_adaptor(
    state: AdaptorState, matrices: Mapping[str, TensorEntry], path: Path | str, *, overwrite: bool = False
) -> None:
    """Write `state` to `path`, whole or not at all, with the experts' `matrices` read from memory or from files.

    Raises:
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
    """
    entries = {name: TensorEntry.from_tensor(tensor) for name, tensor in _small_tensors(state).items()}
    header = {
        "format": FORMAT,
        "tool": f"lemoe {__version__}",
        "base": state.base.as_dict(),
        "settings": state.settings.as_dict(),
        "rounds": [vars(record) for record in state.rounds],
    }
    write_tensors(Path(path), METADATA_KEY, header, {**entries, **matrices}, overwrite=overwrite)


class AdaptorFile:
    """An adaptor file whose experts stay on disk until they are read.

    Attributes:
        path: of the file itself.
        tool: the version that wrote it.
        state: what the file holds, with experts that have shapes but no values (device `meta`).
    """

    def __init__(self, path: Path | str):
        """Open the file at `path`, or the one in a run's folder, and check all but the experts' values.

        Raises:
            AdaptorError: if the file is missing, truncated, of another kind or version, or if any tensor is missing,
                unexpected, or of the wrong shape or type; all such tensors are listed.
        """
        self.path = adaptor_path(path)
        with open_safetensors(self.path, "pt") as file:
            header = read_header(self.path, file.metadata() or {})
            self.tool: str = header["tool"]
            names = list(file.keys())
            tensors = {
                name: _read_shape(file, name) if name in MATRICES else _read_tensor(file, name) for name in names
            }
        with _report_damage(self.path):
            self.state = _build_state(self.path, header, tensors)
            self._stored = stored_tensors(self.path)
        self._hash_checked = False

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of one of the experts' matrices.

        Raises:
            AdaptorError: if a value is not finite.
        """
        try:
            part = self._stored[name].read_rows(start, end)
        except (OSError, ValueError, RuntimeError) as error:
            raise AdaptorError(f"{self.path}: cannot be read any more: {error}") from None
        if not bool(part.isfinite().all()):
            raise AdaptorError(f"{self.path}: not a valid adaptor:\n  {name}: holds values that are not finite")
        return part

    def check_hash(self) -> None:
        """Compare the hash of the whole file with the one stored in it, once.

        Raises:
            AdaptorError: if it is not as it was written.
        """
        with _report_damage(self.path):
            self._hash_checked = self._hash_checked or matches_stored_hash(self.path, METADATA_KEY)
        if not self._hash_checked:
            raise AdaptorError(f"{self.path}: damaged, or changed by hand: it is not as it was written")

    def load(self) -> AdaptorState:
        """The state with all its experts.

        Raises:
            AdaptorError: if a value is not finite, or the file is not as it was written.
        """
        experts = self.state.experts
        gate = None if experts.gate is None else self.read_rows("experts.gate", 0, len(experts.gate))
        up, down = (self.read_rows(name, 0, len(experts.up)) for name in ("experts.up", "experts.down"))
        self.check_hash()
        return replace(self.state, experts=replace(experts, up=up, down=down, gate=gate))


def load_adaptor(path: Path | str) -> AdaptorState:
    """Read an adaptor file, or the one in a run's folder.

    Raises:
        AdaptorError: if the file is missing, truncated, of another kind or version, or if any tensor is missing,
            unexpected, of the wrong shape or type, or not finite; all such tensors are listed; or if anything is
            not as it was written.

    Example:
        >>> import lemoe
        >>> state = lemoe.load_adaptor("edits.lemoe")  # or edits.lemoe/adaptor.safetensors
        >>> state.settings.method
        'anchor'
    """
    return AdaptorFile(path).load()


@contextmanager
def _report_damage(path: Path) -> Iterator[None]:
    """Report what goes wrong while reading metadata as damage of the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise AdaptorError(f"{path}: its metadata is damaged ({type(error).__name__}: {error})") from None


def _read_shape(file: Any, name: str) -> Tensor:
    part = file.get_slice(name)
    shape = part.get_shape()
    return torch.empty(shape, dtype=(part[0:0] if shape else file.get_tensor(name)).dtype, device="meta")


def _read_tensor(file: Any, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name).clone()
    return tensor


def _small_tensors(state: AdaptorState) -> dict[str, Tensor]:
    """All tensors but the experts' matrices, by name."""
    experts = state.experts
    return {"experts.offsets": experts.offsets, "experts.scale": experts.scale, **state.router.tensors()}


def state_tensors(state: AdaptorState) -> dict[str, Tensor]:
    """All tensors of the state's file, by name."""
    return {**expert_matrices(state), **_small_tensors(state)}


def expert_matrices(state: AdaptorState) -> dict[str, Tensor]:
    """The experts' matrices, by name."""
    matrices = zip(MATRICES, (state.experts.up, state.experts.down, state.experts.gate), strict=True)
    return {name: tensor for name, tensor in matrices if tensor is not None}


def _build_state(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdaptorState:
    base = _parse_record(Fingerprint, header["base"])
    rounds = tuple(_parse_record(RoundRecord, entry) for entry in header["rounds"])
    for record in rounds:
        if record.experts < 1 or len(record.ids) != len(record.edits):
            raise ValueError("a round without experts, or with another number of names than of edits")
        if {len(record.prompts), len(record.targets)} not in ({0}, {len(record.edits)}):
            raise ValueError("a round with more or fewer prompts or targets than edits")
    try:
        values = coerce_settings("its settings", header["settings"])
        if values != header["settings"]:
            raise ValueError("settings of the wrong type")
        if header["format"] < FIRST_WITH_MEANING:
            values = {**values, "gate": "words"}
        settings = Settings(**values)
    except InputError as error:
        raise AdaptorError(f"{path}: {error}") from None
    _check_tensors(path, base, rounds, settings, tensors)
    experts = Experts(
        tensors["experts.up"],
        tensors["experts.down"],
        tensors.get("experts.gate"),
        tensors["experts.offsets"],
        tensors["experts.scale"],
    )
    lineages = [lineage for record in rounds for lineage in record.lineages]
    router = ROUTERS[settings.method].from_tensors(settings, lineages, tensors)
    return AdaptorState(base, settings, rounds, experts, router)


def _parse_record(kind: type[Record], entry: Mapping[str, Any]) -> Record:
    hints = get_type_hints(kind)
    needed = {field.name for field in fields(kind) if field.default is MISSING}  # later fields have a default
    if not needed <= set(entry) <= set(hints):
        raise KeyError(f"{kind.__name__} needs {sorted(needed)}, has {sorted(entry)}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    wrong = [name for name, value in values.items() if not _matches_type(value, hints[name])]
    if wrong:
        raise TypeError(f"{', '.join(wrong)} of {kind.__name__}: of the wrong type")
    return kind(**values)


def _matches_type(value: Any, hint: Any) -> bool:
    """Whether `value` has the type that `hint`, of a record's field, names."""
    inside = get_args(hint)
    if isinstance(hint, UnionType):
        return any(_matches_type(value, option) for option in inside)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_matches_type(item, inside[0]) for item in value)
    return type(value) is hint or (hint is float and type(value) is int)


def _check_tensors(
    path: Path, base: Fingerprint, rounds: tuple[RoundRecord, ...], settings: Settings, tensors: Mapping[str, Tensor]
) -> None:
    """Refuse tensors that are missing, unexpected, mis-shaped or not finite, listing them all."""
    neurons = _count_neurons(tensors)
    rows = max((tensor.shape[0] for tensor in tensors.values() if tensor.dim()), default=0)
    if sum(record.experts for record in rounds) > rows:
        raise ValueError("its rounds name more experts than it has")
    lineages = [lineage for record in rounds for lineage in record.lineages]
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        "experts.up": ((neurons, base.hidden), None),
        "experts.down": ((neurons, base.hidden), None),
        "experts.offsets": ((len(lineages) + 1,), torch.int64),
        "experts.scale": ((len(lineages),), None),
        **({"experts.gate": ((neurons, base.hidden), None)} if base.gated else {}),
        **ROUTERS[settings.method].expected_tensors(settings, base.hidden, lineages, tensors),
    }
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    problems += [f"{name}: not expected" for name in tensors if name not in expected]
    for name, (shape, dtype) in expected.items():
        if name in tensors:
            problems += _tensor_problems(name, tensors[name], shape, dtype)
    if not problems and not are_valid_offsets(tensors["experts.offsets"], neurons):
        problems.append("experts.offsets: out of order")
    if problems:
        raise AdaptorError("\n  ".join([f"{path}: not a valid adaptor:", *problems]))


def _count_neurons(tensors: Mapping[str, Tensor]) -> int:
    """The number of neurons by the offsets; where those are missing, by the first matrix."""
    offsets, up = tensors.get("experts.offsets"), tensors.get("experts.up")
    if offsets is not None and offsets.numel():
        return int(offsets.flatten()[-1])
    return up.shape[0] if up is not None and up.dim() else 0


def _tensor_problems(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> list[str]:
    if tuple(tensor.shape) != shape:
        return [f"{name}: shape {list(tensor.shape)}, expected {list(shape)}"]
    if not (tensor.is_floating_point() if dtype is None else tensor.dtype == dtype):
        return [f"{name}: type {tensor.dtype}, expected {dtype or 'floating point'}"]
    if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
        return [f"{name}: holds values that are not finite"]
    return []
