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
    from lemoe.adaptor.checkpoint import load_adaptor, save_adaptor
    from lemoe.adaptor.state import AdaptorState, stack
    from lemoe.base.loading import BaseModel, answer, load_base
    from lemoe.data.edits import Edit, Probe, read_edits
    from lemoe.errors import LemoeError
    from lemoe.evaluation.comparison import compare
    from lemoe.evaluation.evaluate import evaluate
    from lemoe.evaluation.factors import measure_factors
    from lemoe.evaluation.harness import evaluate_tasks
    from lemoe.inference.asking import Reply, ask
    from lemoe.inference.insertion import InsertedAdaptor, insert
    from lemoe.planning.plan import Plan, plan
    from lemoe.runs.edit import edit
    from lemoe.settings import Settings, resolve_settings
    from lemoe.training.rounds import train_round

_HOMES = {
    "AdaptorState": "adaptor.state",
    "BaseModel": "base.loading",
    "Edit": "data.edits",
    "InsertedAdaptor": "inference.insertion",
    "LemoeError": "errors",
    "Plan": "planning.plan",
    "Probe": "data.edits",
    "Reply": "inference.asking",
    "Settings": "settings",
    "answer": "base.loading",
    "ask": "inference.asking",
    "compare": "evaluation.comparison",
    "edit": "runs.edit",
    "evaluate": "evaluation.evaluate",
    "evaluate_tasks": "evaluation.harness",
    "insert": "inference.insertion",
    "load_adaptor": "adaptor.checkpoint",
    "load_base": "base.loading",
    "measure_factors": "evaluation.factors",
    "plan": "planning.plan",
    "read_edits": "data.edits",
    "resolve_settings": "settings",
    "save_adaptor": "adaptor.checkpoint",
    "stack": "adaptor.state",
    "train_round": "training.rounds",
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
    "evaluate_tasks",
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
