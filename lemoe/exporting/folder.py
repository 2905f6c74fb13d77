"""A complete model folder from a base and adaptors: the base's files, the stacked adaptor, and the code to run them."""

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
from lemoe.adaptor.merging import MergeResult, OnConflict, merge_adaptors
from lemoe.adaptor.state import AdaptorState
from lemoe.base.embedded import Notify, embedded_folder
from lemoe.base.frozen.scale import CALIBRATION_TEXTS
from lemoe.base.loading import BaseModel, load_base
from lemoe.base.sources import ModelSource
from lemoe.data.files import check_overwrite, remove_scratch, replace_folder, restore_replaced, scratch_folder
from lemoe.errors import LemoeError, ModelError, OutputError
from lemoe.exporting import answers
from lemoe.exporting.code import MODELING, exported_code
from lemoe.inference.insertion import insert
from lemoe.report.card import write_export_card
from lemoe.routing.anchor.anchors import Anchors

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in one file, or in several with an index
COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # of the other files of a model and its tokenizer
COMPARED_PROMPTS = 12  # of the adaptor; compared as well is every text of `CALIBRATION_TEXTS`
ANSWER_TOKENS = 16  # generated for each compared text


@dataclass(frozen=True)
class ExportResult:
    """An export: the folder, the merged adaptor in it, its size in bytes, and how many texts were compared."""

    folder: Path
    merged: MergeResult
    size: int
    compared: int


@dataclass(frozen=True)
class ExportOptions:
    """How base and adaptors are read and written.

    Attributes:
        device, revision: of the base; see `load_base`.
        on_conflict, drop, dtype: see `merge_adaptors`.
        overwrite: replace the folder if it is there.
    """

    device: str = "auto"
    revision: str | None = None
    on_conflict: OnConflict = "latest"
    drop: Sequence[str] = ()
    dtype: str | None = None
    overwrite: bool = False


def export_model(
    model: Path | str,
    paths: Sequence[Path | str],
    folder: Path | str,
    options: ExportOptions | None = None,
    *,
    notify: Notify = lambda stage: None,
) -> ExportResult:
    """Write a folder that transformers loads with `trust_remote_code=True`, without lemoe, as base and adaptors.

    1. Merge the adaptors and compute answers of the base with them: to some of the edits' prompts and to other texts.
    2. Write the folder under a temporary name.
    3. Load it in a Python that cannot import lemoe, and compare logits and greedy answers, bit for bit.
    4. Give the folder its name if all are the same; else remove it.

    Args:
        model: of the base: a preset name, a folder, or a hub id.
        paths: of the adaptors, in order.
        folder: to be written.
        options: a new folder, with all of the adaptors' edits, if None.
        notify: called with one line for each stage that takes time.

    Raises:
        ModelError: if the base cannot be loaded, is not a class of transformers, or has no weights that can be copied.
        AdaptorError: as `merge_adaptors`; or if the adaptors belong to another base.
        OutputError: if the folder exists or cannot be written.
        LemoeError: if the folder does not answer as base and adaptor do.
    """
    folder, options = Path(folder), options or ExportOptions()
    restore_replaced(folder)
    check_overwrite(folder, overwrite=options.overwrite)
    with _publish_folder(folder, overwrite=options.overwrite) as scratch:
        merged = merge_adaptors(
            paths,
            scratch / ADAPTOR_NAME,
            on_conflict=options.on_conflict,
            drop=options.drop,
            dtype=options.dtype,
        )
        base = load_base(model, device=options.device, revision=options.revision, notify=notify)
        state = load_adaptor(scratch)
        texts = _comparison_texts(base, state)
        notify("asking base and adaptor")
        with insert(base, state):
            expected = answers.compute_answers(base.model, base.tokenizer, texts, ANSWER_TOKENS)
        notify("copying the base")
        _write_base_files(scratch, base, state)
        placement = {"device": str(base.device), "dtype": str(base.dtype).removeprefix("torch.")}
        del base
        notify("loading the folder and comparing")
        _compare_answers(scratch, placement, texts, expected)
        size = sum(path.stat().st_size for path in scratch.iterdir())
    return ExportResult(folder, merged, size, len(texts))


@contextmanager
def _publish_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a scratch folder beside `folder`, renamed to it on success and removed on failure."""
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


def _comparison_texts(base: BaseModel, state: AdaptorState) -> list[str]:
    """Prompts of edits, evenly spaced over the adaptor if it stores them, and texts that no edit is about."""
    anchors = state.router.anchors if isinstance(state.router, Anchors) else ()
    chosen = anchors[:: max(1, len(anchors) // COMPARED_PROMPTS)][:COMPARED_PROMPTS]
    own = (base.tokenizer.decode(list(anchor.prompt), skip_special_tokens=True) for anchor in chosen)
    return [*own, *CALIBRATION_TEXTS]


def _write_base_files(folder: Path, base: BaseModel, state: AdaptorState) -> None:
    """Write everything but the adaptor."""
    source = _base_folder(base.source)
    for path in _base_files(source):
        shutil.copyfile(path, folder / path.name)
    config, model = type(base.model.config), type(base.model)
    for kind in (config, model):
        if getattr(transformers, kind.__name__, None) is not kind:
            raise ModelError(f"{base.source}: {kind.__name__} is not a class of transformers; it cannot be exported")
    settings = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    settings.update(_config_additions(base, state))
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name, text in exported_code(config.__name__, model.__name__, state.settings.method).items():
        (folder / name).write_text(text, encoding="utf-8")
    write_export_card(folder, base, state)


def _config_additions(base: BaseModel, state: AdaptorState) -> Mapping[str, Any]:
    """The entries of the configuration beyond the base's: the code, what the base is, the modules that are needed."""
    site = base.ffn_site(state.base.layer, state.settings.layer_path)
    paths = {module: path for path, module in base.model.named_modules()}
    modules = {"decoder": base.decoder, "entry": site.entry, "exit": site.exit, "activation": site.activation}
    if state.router.layer_read is not None:
        modules["layer_read"] = base.layers[state.router.layer_read]
    return {
        "model_type": "lemoe",
        "architectures": ["LemoeForCausalLM"],
        "auto_map": {"AutoConfig": f"{MODELING}.LemoeConfig", "AutoModelForCausalLM": f"{MODELING}.LemoeForCausalLM"},
        "lemoe": {
            "base": {"model_type": base.model.config.model_type, "architectures": [type(base.model).__name__]},
            "modules": {name: paths[module] for name, module in modules.items()},
        },
    }


def _base_folder(source: ModelSource) -> Path:
    """The folder with the base's files."""
    if source.embedded:
        return embedded_folder()
    if Path(source.location).is_dir():
        return Path(source.location)
    wanted = [
        "*.safetensors",
        "pytorch_model*.bin",
        "LICENSE*",
        "NOTICE*",
        *(f"*{ending}" for ending in COPIED_SUFFIXES),
    ]
    return Path(snapshot_download(source.location, revision=source.revision, allow_patterns=wanted))


def _base_files(source: Path) -> list[Path]:
    """The base's weights in one format, and the other files of the model and its tokenizer."""
    weights = next((files for name in WEIGHTS if (files := _weight_files(source, name))), None)
    if weights is None:
        raise ModelError(f"{source}: holds no {' or '.join(WEIGHTS)} to be copied")
    others = [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and (path.suffix in COPIED_SUFFIXES or path.name.startswith(("LICENSE", "NOTICE")))
        and path.name != CONFIG
        and not path.name.endswith(".index.json")
    ]
    return [*weights, *others]


def _weight_files(source: Path, name: str) -> list[Path]:
    """The weights called `name`, or their index and its files if they are in several; empty if there are none."""
    index = source / f"{name}.index.json"
    if index.is_file():
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [index, *(source / part for part in parts)]
    return [source / name] if (source / name).is_file() else []


def _compare_answers(
    folder: Path, placement: Mapping[str, str], texts: Sequence[str], expected: list[dict[str, Any]]
) -> None:
    request = json.dumps({"folder": str(folder), **placement, "texts": list(texts), "length": ANSWER_TOKENS})
    with tempfile.TemporaryDirectory() as modules:
        environment = {**os.environ, "HF_MODULES_CACHE": modules, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, str(answers.__file__)]
        run = subprocess.run(command, input=request, capture_output=True, text=True, env=environment, check=False)
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
