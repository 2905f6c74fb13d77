"""Lifelong model editing: teach a causal language model new facts, round after round.

import lemoe

base = lemoe.load_base("llama")
edited = lemoe.insert(base, "edits.lemoe/adaptor.safetensors")
print(lemoe.answer(base, "The Eiffel Tower is located in the city of"))
edited.remove()
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lemoe.adaptor import AdaptorState, stack
    from lemoe.asking import Reply, ask
    from lemoe.checkpoint import load_adaptor, save_adaptor
    from lemoe.comparison import compare
    from lemoe.editing import edit
    from lemoe.edits import Edit, Probe, read_edits
    from lemoe.errors import LemoeError
    from lemoe.evaluation import evaluate
    from lemoe.factors import measure_factors
    from lemoe.insertion import InsertedAdaptor, insert
    from lemoe.methods import train_round
    from lemoe.models import BaseModel, answer, load_base
    from lemoe.planning import Plan, plan
    from lemoe.settings import Settings, resolve_settings

_HOMES = {
    "AdaptorState": "adaptor",
    "BaseModel": "models",
    "Edit": "edits",
    "InsertedAdaptor": "insertion",
    "LemoeError": "errors",
    "Plan": "planning",
    "Probe": "edits",
    "Reply": "asking",
    "Settings": "settings",
    "answer": "models",
    "ask": "asking",
    "compare": "comparison",
    "edit": "editing",
    "evaluate": "evaluation",
    "insert": "insertion",
    "load_adaptor": "checkpoint",
    "load_base": "models",
    "measure_factors": "factors",
    "plan": "planning",
    "read_edits": "edits",
    "resolve_settings": "settings",
    "save_adaptor": "checkpoint",
    "stack": "adaptor",
    "train_round": "methods",
}

__all__ = [
    "AdaptorState",
    "BaseModel",
    "Edit",
    "InsertedAdaptor",
    "LemoeError",
    "Plan",
    "Probe",
    "Reply",
    "Settings",
    "__version__",
    "answer",
    "ask",
    "compare",
    "edit",
    "evaluate",
    "insert",
    "load_adaptor",
    "load_base",
    "measure_factors",
    "plan",
    "read_edits",
    "resolve_settings",
    "save_adaptor",
    "stack",
    "train_round",
]


def __getattr__(name: str) -> Any:
    """Load a public name's module when it is first used, so that `import lemoe` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lemoe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lemoe.{_HOMES[name]}"), name)
