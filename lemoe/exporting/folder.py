"""A complete model folder from a base and adaptors: the base's files, copied one by one, the adaptor, and its code."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download

from lemoe.adaptor.checkpoint import load_adaptor
from lemoe.adaptor.header import ADAPTOR_NAME
from lemoe.adaptor.merging import Merged, OnConflict, merge
from lemoe.adaptor.state import AdaptorState
from lemoe.base.embedded import Notify, embedded_folder
from lemoe.base.frozen.scale import CALIBRATION
from lemoe.base.loading import BaseModel, load_base
from lemoe.base.sources import ModelSource
from lemoe.data.files import check_free, remove_scratch, replace_folder, restore_replaced, scratch_folder
from lemoe.errors import LemoeError, ModelError, OutputError
from lemoe.exporting import answers
from lemoe.exporting.code import MODELING, exported_code
from lemoe.inference.insertion import insert
from lemoe.report.card import write_export_card
from lemoe.routing.anchor.anchors import Anchors

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in one file; in several, beside an index
BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # endings of what a tokenizer and a model need
OWN_PROMPTS = 12  # of the adaptor that are compared, and every text of `CALIBRATION`
WRITTEN = 16  # tokens, in answer to each


@dataclass(frozen=True)
class Exported:
    """What an export gives: the folder, what it holds, its size in bytes, and on how many texts it was compared."""

    folder: Path
    merged: Merged
    size: int
    compared: int


def export(
    model: str,
    paths: Sequence[Path | str],
    folder: Path | str,
    *,
    device: str = "auto",
    revision: str | None = None,
    on_conflict: OnConflict = "latest",
    drop: Sequence[str] = (),
    dtype: str | None = None,
    overwrite: bool = False,
    notify: Notify = lambda stage: None,
) -> Exported:
    """Write a folder that transformers loads with `trust_remote_code=True`, without lemoe, as base and adaptors.

    It gets its name only when it was loaded again, by a Python that cannot import lemoe, and has given the same logits
    and the same greedy answers as the base with the adaptor, bit for bit, to some of the edits' prompts and to others.

    Args:
        model: of the base: a preset name, a folder, or a hub id.
        on_conflict, drop, dtype: see `merge`.
        notify: called with one line for each stage that takes time.

    Raises:
        ModelError: if the base cannot be loaded, brings code of its own, or has no weights that can be copied.
        AdaptorError: as `merge`; or if the adaptors belong to another base.
        OutputError: if the folder exists or cannot be written.
        LemoeError: if what was written does not answer as base and adaptor do.
    """
    folder = Path(folder)
    restore_replaced(folder)
    check_free(folder, overwrite=overwrite)
    with _taking_shape(folder, overwrite=overwrite) as scratch:
        merged = merge(paths, scratch / ADAPTOR_NAME, on_conflict=on_conflict, drop=drop, dtype=dtype)
        base = load_base(model, device=device, revision=revision, notify=notify)
        state = load_adaptor(scratch)
        texts = _texts(base, state)
        notify("asking base and adaptor")
        with insert(base, state):
            expected = answers.answers(base.model, base.tokenizer, texts, WRITTEN)
        notify("copying the base")
        _fill(scratch, base, state)
        place = {"device": str(base.device), "dtype": str(base.dtype).removeprefix("torch.")}
        del base
        notify("loading the folder and comparing")
        _compare(scratch, place, texts, expected)
        size = sum(path.stat().st_size for path in scratch.iterdir())
    return Exported(folder, merged, size, len(texts))


@contextmanager
def _taking_shape(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder under a temporary name beside `folder`, which takes its name in the end, or goes."""
    try:
        remove_scratch(folder.parent, folder.name)
        with scratch_folder(folder) as scratch:
            yield scratch
            scratch.chmod(0o755)
            if overwrite and os.path.lexists(folder):
                replace_folder(folder, scratch)
            else:
                scratch.rename(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _texts(base: BaseModel, state: AdaptorState) -> list[str]:
    """Prompts of edits from all over the adaptor, where it holds them, and texts that no edit is about."""
    anchors = state.router.anchors if isinstance(state.router, Anchors) else ()
    chosen = anchors[:: max(1, len(anchors) // OWN_PROMPTS)][:OWN_PROMPTS]
    own = (base.tokenizer.decode(list(anchor.prompt), skip_special_tokens=True) for anchor in chosen)
    return [*own, *CALIBRATION]


def _fill(folder: Path, base: BaseModel, state: AdaptorState) -> None:
    """Everything but the adaptor, which is there."""
    source = _folder_of(base.source)
    for path in _files(source):
        shutil.copyfile(path, folder / path.name)
    config, model = type(base.model.config), type(base.model)
    for kind in (config, model):
        if getattr(transformers, kind.__name__, None) is not kind:
            raise ModelError(f"{base.source}: {kind.__name__} is not a class of transformers; it cannot be exported")
    described = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    described.update(_described(base, state))
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for name, text in exported_code(config.__name__, model.__name__, state.settings.method).items():
        (folder / name).write_text(text, encoding="utf-8")
    write_export_card(folder, base, state)


def _described(base: BaseModel, state: AdaptorState) -> Mapping[str, Any]:
    """What the configuration says beyond the base's."""
    site = base.site(state.base.layer, state.settings.layer_path)
    paths = {module: path for path, module in base.model.named_modules()}
    places = {"decoder": base.decoder, "entry": site.entry, "exit": site.exit, "activation": site.activation}
    return {
        "model_type": "lemoe",
        "architectures": ["LemoeForCausalLM"],
        "auto_map": {"AutoConfig": f"{MODELING}.LemoeConfig", "AutoModelForCausalLM": f"{MODELING}.LemoeForCausalLM"},
        "lemoe": {name: paths[module] for name, module in places.items()},
    }


def _folder_of(source: ModelSource) -> Path:
    """The folder with the base's files."""
    if source.embedded:
        return embedded_folder()
    if Path(source.location).is_dir():
        return Path(source.location)
    wanted = ["*.safetensors", "pytorch_model*.bin", "LICENSE*", "NOTICE*", *(f"*{ending}" for ending in BESIDE)]
    return Path(snapshot_download(source.location, revision=source.revision, allow_patterns=wanted))


def _files(source: Path) -> list[Path]:
    """The base's weights and what stands beside them, without weights in other forms."""
    weights = next((files for name in WEIGHTS if (files := _weights(source, name))), None)
    if weights is None:
        raise ModelError(f"{source}: holds no {' or '.join(WEIGHTS)} to be copied")
    beside = [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and (path.suffix in BESIDE or path.name.startswith(("LICENSE", "NOTICE")))
        and path.name != CONFIG
        and not path.name.endswith(".index.json")
    ]
    return [*weights, *beside]


def _weights(source: Path, name: str) -> list[Path]:
    """The files of the weights that are kept as `name`, or in several files beside its index; none if not there."""
    index = source / f"{name}.index.json"
    if index.is_file():
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [index, *(source / part for part in parts)]
    return [source / name] if (source / name).is_file() else []


def _compare(folder: Path, place: Mapping[str, str], texts: Sequence[str], expected: list[dict[str, Any]]) -> None:
    asked = json.dumps({"folder": str(folder), **place, "texts": list(texts), "length": WRITTEN})
    with tempfile.TemporaryDirectory() as modules:
        there = {**os.environ, "HF_MODULES_CACHE": modules, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, str(answers.__file__)]
        run = subprocess.run(command, input=asked, capture_output=True, text=True, env=there, check=False)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise LemoeError(f"the exported folder cannot be loaded, and was not kept: {reason}")
    given = json.loads(run.stdout.strip().splitlines()[-1])
    differ = [text for text, one, other in zip(texts, expected, given, strict=True) if one != other]
    if differ:
        raise LemoeError(
            f"the exported folder answers {len(differ)} of {len(texts)} prompts in another way than base and adaptor, "
            f"and was not kept; first: {differ[0]!r}"
        )
