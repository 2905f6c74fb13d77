"""Lifelong model editing: teach a causal language model new facts, round after round.

import lemoe

base = lemoe.load_base("llama")
lemoe.edit(base, "edits.jsonl", "edits.lemoe")
with lemoe.insert(base, "edits.lemoe"):
    print(lemoe.answer(base, "The Eiffel Tower is located in the city of"))
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lemoe.adaptor.checkpoint import load_adaptor, save_adaptor
    from lemoe.adaptor.state import AdaptorState, stack
    from lemoe.base.loading import BaseModel, answer, load_base
    from lemoe.data.conversation import Conversation
    from lemoe.data.edits import Edit, Probe, read_edits
    from lemoe.errors import LemoeError
    from lemoe.evaluation.comparison import Comparison, compare
    from lemoe.evaluation.evaluate import EvalOptions, EvalResult, evaluate
    from lemoe.evaluation.factors import Factors, measure_factors
    from lemoe.evaluation.harness import TaskMetric, TaskOptions, evaluate_tasks
    from lemoe.inference.asking import Reply, ask
    from lemoe.inference.insertion import InsertedAdaptor, insert
    from lemoe.planning.plan import Plan, plan
    from lemoe.runs.edit import EditOptions, EditReport, edit
    from lemoe.settings import Settings, resolve_settings
    from lemoe.training.rounds import train_round

_HOMES = {
    "AdaptorState": "adaptor.state",
    "BaseModel": "base.loading",
    "Comparison": "evaluation.comparison",
    "Conversation": "data.conversation",
    "Edit": "data.edits",
    "EditOptions": "runs.edit",
    "EditReport": "runs.edit",
    "EvalOptions": "evaluation.evaluate",
    "EvalResult": "evaluation.evaluate",
    "Factors": "evaluation.factors",
    "InsertedAdaptor": "inference.insertion",
    "LemoeError": "errors",
    "Plan": "planning.plan",
    "Probe": "data.edits",
    "Reply": "inference.asking",
    "Settings": "settings",
    "TaskMetric": "evaluation.harness",
    "TaskOptions": "evaluation.harness",
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
    "Comparison",
    "Conversation",
    "Edit",
    "EditOptions",
    "EditReport",
    "EvalOptions",
    "EvalResult",
    "Factors",
    "InsertedAdaptor",
    "LemoeError",
    "Plan",
    "Probe",
    "Reply",
    "Settings",
    "TaskMetric",
    "TaskOptions",
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


def __dir__() -> list[str]:
    """The public names, and the modules that have been imported."""
    modules = [name for name, value in globals().items() if isinstance(value, ModuleType) and name != "importlib"]
    return [*__all__, *modules]
