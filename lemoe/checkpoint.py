"""Adaptor files: one safetensors file is one state, written whole or not at all, read with every check.

All metadata is sorted JSON under one key, so that equal states give equal files, byte for byte.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lemoe import __version__
from lemoe.adaptor import AdaptorState, RoundRecord
from lemoe.errors import AdaptorError, InputError, OutputError
from lemoe.experts import Experts
from lemoe.methods import ROUTERS
from lemoe.models import Fingerprint
from lemoe.routing import Lineage, offsets_hold
from lemoe.settings import Settings, coerce_settings

FORMAT = 1
ADAPTOR_NAME = "adaptor.safetensors"
METADATA_KEY = "lemoe"

Record = TypeVar("Record", Fingerprint, RoundRecord)


def save_adaptor(state: AdaptorState, path: Path | str, *, overwrite: bool = False) -> None:
    """Write `state` to `path`, whole or not at all.

    Raises:
        AdaptorError: if the state holds values that are not finite, which no file may.
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
    """
    header = {
        "format": FORMAT,
        "tool": f"lemoe {__version__}",
        "base": state.base.as_dict(),
        "settings": state.settings.as_dict(),
        "rounds": [asdict(record) for record in state.rounds],
    }
    tensors = _tensors(state)
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        raise AdaptorError(f"{path}: not written, these hold values that are not finite: {', '.join(broken)}")
    content = save(tensors, {METADATA_KEY: json.dumps(header, sort_keys=True)})
    write_whole(Path(path), content, overwrite=overwrite)


def write_whole(path: Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write through a temporary name in the same folder, fsync, and rename.

    Raises:
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
    """
    check_free(path, overwrite=overwrite)
    scratch: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o666 & ~_umask())
        os.replace(scratch, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        if scratch:
            with suppress(OSError):
                Path(scratch).unlink(missing_ok=True)


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Refuse, before anything is computed, an output that exists.

    Raises:
        OutputError: saying how to go on.
    """
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; give another path, or --force to replace it")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every system lets a folder be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_adaptor(path: Path | str) -> AdaptorState:
    """Read an adaptor file, or the one in a run's folder.

    Raises:
        AdaptorError: if the file is missing, truncated, of another kind or version, or if any tensor is missing,
            unexpected, of the wrong shape or type, or not finite; all such tensors are listed.
    """
    path = _file_of(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _header(path, file.metadata() or {})
            # Cloned, since memory-mapped tensors are aligned by chance, and products differ in the last bit by it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise AdaptorError(f"{path}: no such file") from None
    except OSError as error:
        raise AdaptorError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise AdaptorError(f"{path}: not a whole safetensors file ({error}); copy or train it again") from None
    try:
        return _state(path, header, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise AdaptorError(f"{path}: its metadata is damaged ({type(error).__name__}: {error})") from None


def stored_tool(path: Path | str) -> tuple[Path, str]:
    """The file that `path` means, and the version that wrote it; for a file that `load_adaptor` takes."""
    path = _file_of(path)
    with safe_open(path, framework="pt", device="cpu") as file:
        return path, str(_header(path, file.metadata() or {}).get("tool", "unknown"))


def _file_of(path: Path | str) -> Path:
    """The adaptor file itself, or the one in a run's folder."""
    path = Path(path)
    return path / ADAPTOR_NAME if path.is_dir() else path


def _header(path: Path, stored: Mapping[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in stored:
        raise AdaptorError(f"{path}: a safetensors file, but not a lemoe adaptor (no `{METADATA_KEY}` in its metadata)")
    try:
        header = json.loads(stored[METADATA_KEY])
        version = header["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise AdaptorError(f"{path}: its metadata is damaged") from None
    if version != FORMAT:
        raise AdaptorError(f"{path}: format {version!r}; this lemoe reads format {FORMAT}. Update lemoe")
    assert isinstance(header, dict)
    return header


def _tensors(state: AdaptorState) -> dict[str, Tensor]:
    experts = state.experts
    tensors = {
        "experts.up": experts.up,
        "experts.down": experts.down,
        "experts.offsets": experts.offsets,
        "experts.scale": experts.scale,
        **state.router.tensors(),
    }
    if experts.gate is not None:
        tensors["experts.gate"] = experts.gate
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _state(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdaptorState:
    base = _record(Fingerprint, header["base"])
    rounds = tuple(_record(RoundRecord, entry) for entry in header["rounds"])
    try:
        settings = Settings(**coerce_settings(str(path), header["settings"]))
    except InputError as error:
        raise AdaptorError(str(error)) from None
    _check(path, base, rounds, settings, tensors)
    experts = Experts(
        tensors["experts.up"],
        tensors["experts.down"],
        tensors.get("experts.gate"),
        tensors["experts.offsets"],
        tensors["experts.scale"],
    )
    router = ROUTERS[settings.method].from_tensors(settings, tensors)
    return AdaptorState(base, settings, rounds, experts, router)


def _record(kind: type[Record], entry: Mapping[str, Any]) -> Record:
    names = {field.name for field in fields(kind)}
    if set(entry) != names:
        raise KeyError(f"{kind.__name__} needs {sorted(names)}, has {sorted(entry)}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return kind(**values)


def _check(
    path: Path, base: Fingerprint, rounds: tuple[RoundRecord, ...], settings: Settings, tensors: Mapping[str, Tensor]
) -> None:
    """All tensors that are missing, unexpected, mis-shaped or not finite, at once."""
    neurons = _neurons(tensors)
    lineages = [Lineage(record.id, record.parent, record.depth) for record in rounds for _ in range(record.experts)]
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        "experts.up": ((neurons, base.hidden), None),
        "experts.down": ((neurons, base.hidden), None),
        "experts.offsets": ((len(lineages) + 1,), torch.int64),
        "experts.scale": ((len(lineages),), None),
        **({"experts.gate": ((neurons, base.hidden), None)} if base.gated else {}),
        **ROUTERS[settings.method].expected(settings, base.hidden, lineages, tensors),
    }
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    problems += [f"{name}: not expected" for name in tensors if name not in expected]
    for name, (shape, dtype) in expected.items():
        if name in tensors:
            problems += _tensor_problems(name, tensors[name], shape, dtype)
    if not problems and not offsets_hold(tensors["experts.offsets"], neurons):
        problems.append("experts.offsets: out of order")
    if problems:
        raise AdaptorError("\n  ".join([f"{path}: not a valid adaptor:", *problems]))


def _neurons(tensors: Mapping[str, Tensor]) -> int:
    """As many as the offsets say; where those are missing, as many as the first matrix has."""
    offsets, up = tensors.get("experts.offsets"), tensors.get("experts.up")
    if offsets is not None and offsets.numel():
        return int(offsets.flatten()[-1])
    return up.shape[0] if up is not None and up.dim() else 0


def _tensor_problems(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> list[str]:
    if tuple(tensor.shape) != shape:
        return [f"{name}: shape {list(tensor.shape)}, expected {list(shape)}"]
    if not (tensor.is_floating_point() if dtype is None else tensor.dtype == dtype):
        return [f"{name}: type {tensor.dtype}, expected {dtype or 'floating point'}"]
    if dtype is None and not bool(tensor.isfinite().all()):
        return [f"{name}: holds values that are not finite"]
    return []
