"""The code of an exported folder: lemoe's own modules as they run here, side by side, importing each other."""

import re
from importlib import resources

from lemoe import __version__
from lemoe.routing.registry import ROUTERS

MODELING = "modeling_lemoe"
_ROUTER = re.compile(r"from lemoe\.\S+ import \w+ as StoredRouter")
_IMPORT = re.compile(r"^from lemoe\.([\w.]+) import", re.MULTILINE)


def exported_code(config: str, model: str, method: str) -> dict[str, str]:
    """The files, by name, with which a folder needs no lemoe.

    Args:
        config, model: names of the base's classes in transformers.
        method: of the adaptor.
    """
    router = ROUTERS[method]
    text = _source(f"exporting.{MODELING}").replace("LlamaConfig as", f"{config} as")
    text = text.replace("LlamaForCausalLM as", f"{model} as")
    text = _ROUTER.sub(f"from {router.__module__} import {router.__name__} as StoredRouter", text)
    files, waiting = {f"{MODELING}.py": text}, _IMPORT.findall(text)
    while waiting:
        module = waiting.pop()
        if _file(module) not in files:
            files[_file(module)] = _source(module)
            waiting += _IMPORT.findall(files[_file(module)])
    note = f"# From lemoe {__version__}. SPDX-License-Identifier: Apache-2.0\n"
    return {name: note + _IMPORT.sub(_beside, text) for name, text in files.items()}


def _source(module: str) -> str:
    return resources.files("lemoe").joinpath(f"{module.replace('.', '/')}.py").read_text("utf-8")


def _file(module: str) -> str:
    return f"{module.replace('.', '_')}.py"


def _beside(found: re.Match[str]) -> str:
    """The import of a module that stands in the same folder."""
    return f"from .{found[1].replace('.', '_')} import"
