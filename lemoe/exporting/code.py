"""The code of an exported folder: lemoe's own modules in one folder, with relative imports."""

import re
from importlib import resources

from lemoe import __version__
from lemoe.routing.registry import ROUTERS

MODELING = "modeling_lemoe"
_ROUTER = re.compile(r"from lemoe\.\S+ import \w+ as StoredRouter")
_IMPORT = re.compile(r"^from lemoe\.([\w.]+) import", re.MULTILINE)


def exported_code(config: str, model: str, method: str) -> dict[str, str]:
    """The files, by name, that let a folder be loaded without lemoe.

    Args:
        config, model: names of the base's classes in transformers.
        method: of the adaptor.
    """
    router = ROUTERS[method]
    text = _read_module_source(f"exporting.{MODELING}").replace("LlamaConfig as", f"{config} as")
    text = text.replace("LlamaForCausalLM as", f"{model} as")
    text = _ROUTER.sub(f"from {router.__module__} import {router.__name__} as StoredRouter", text)
    files, waiting = {f"{MODELING}.py": text}, _IMPORT.findall(text)
    while waiting:
        module = waiting.pop()
        if _module_file_name(module) not in files:
            files[_module_file_name(module)] = _read_module_source(module)
            waiting += _IMPORT.findall(files[_module_file_name(module)])
    note = f"# From lemoe {__version__}. SPDX-License-Identifier: Apache-2.0\n"
    return {name: note + _IMPORT.sub(_make_import_relative, text) for name, text in files.items()}


def _read_module_source(module: str) -> str:
    return resources.files("lemoe").joinpath(f"{module.replace('.', '/')}.py").read_text("utf-8")


def _module_file_name(module: str) -> str:
    return f"{module.replace('.', '_')}.py"


def _make_import_relative(found: re.Match[str]) -> str:
    """The import of a module in the same folder."""
    return f"from .{found[1].replace('.', '_')} import"
