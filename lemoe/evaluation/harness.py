"""General ability, before and after, on the tasks of lm-evaluation-harness (the extra `harness`)."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.adaptor.state import AdaptorState
from lemoe.base.loading import BaseLike, BaseModel, resolve_base
from lemoe.base.matmul import use_onednn
from lemoe.base.placement import is_offloaded
from lemoe.errors import InputError
from lemoe.inference.insertion import insert

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class TaskMetric:
    """One metric of one task.

    Attributes:
        task: its name, or that of a group of tasks.
        metric: name of the metric, with its filter behind a comma where that is not `none`.
        higher_is_better: None where the task does not say.
        before, after: of the base and the edited model; `after` is None where no adaptor was measured.
        stderr: standard error of `after`, or of `before` where there is no `after`; None where there is none.
        n: documents measured.

    Example:
        >>> import lemoe
        >>> options = lemoe.TaskOptions(tasks_path="tasks")
        >>> metric = lemoe.evaluate_tasks("llama", None, ["other_facts"], options)[0]
        >>> metric.task, metric.after
        ('other_facts', None)
    """

    task: str
    metric: str
    higher_is_better: bool | None
    before: float
    after: float | None
    stderr: float | None
    n: int


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run.

    Attributes:
        tasks_path: folder of further tasks, as YAML files.
        limit: only the first documents of each task.
        batch_size: texts that run through the model at once.
        expert_cache: bytes of experts that are kept in memory of an adaptor that is given as its file; see `insert`.
        allow_base_mismatch: measure an adaptor on a base that it was not made for, if its shapes fit.

    Example:
        >>> import lemoe
        >>> options = lemoe.TaskOptions(tasks_path="tasks", limit=2)
        >>> lemoe.evaluate_tasks("llama", None, ["other_facts"], options)[0].n
        2
    """

    tasks_path: Path | str | None = None
    limit: int | None = None
    batch_size: int = 16
    expert_cache: int | None = None
    allow_base_mismatch: bool = False


def evaluate_tasks(
    base: BaseLike,
    adaptor: AdaptorState | AdaptorFile | Path | str | None,
    tasks: Sequence[str],
    options: TaskOptions | None = None,
) -> list[TaskMetric]:
    """Measure `adaptor` on tasks of lm-evaluation-harness; without one, the base model alone.

    Data sets are fetched as the tasks say. The harness does not tell where a prompt ends, so that preset `paper`
    routes by all that is read, text by text.

    Args:
        base: or what `load_base` takes.
        adaptor: as a state, or the path of its file or of a run's folder.
        tasks: names of tasks or groups of them.

    Raises:
        InputError: if the extra is not installed, or a task cannot be had.
        AdaptorError: if the adaptor belongs to another base model.

    Example:
        >>> import lemoe
        >>> options = lemoe.TaskOptions(tasks_path="tasks")
        >>> metrics = lemoe.evaluate_tasks(lemoe.load_base("llama"), "edits.lemoe", ["other_facts"], options)
        >>> all(metric.before == metric.after for metric in metrics)
        True
    """
    options = options or TaskOptions()
    with _silence_harness():
        manager = _load_task_manager(tasks, options.tasks_path)
        base, edited = resolve_base(base), None
        if adaptor is not None:
            edited = insert(
                base, adaptor, expert_cache=options.expert_cache, allow_base_mismatch=options.allow_base_mismatch
            )
        with use_onednn(base.model), edited or nullcontext():
            model = _wrap_model(base, 1 if edited and edited.state.router.by_prompt else options.batch_size)
            with edited.bypassed() if edited else nullcontext():
                before = _run_tasks(model, tasks, manager, options.limit)
            after = _run_tasks(model, tasks, manager, options.limit) if edited else None
    return list(_pair_results(before, after))


@contextmanager
def _silence_harness() -> Iterator[None]:
    """While open, the harness logs errors alone."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_task_manager(tasks: Sequence[str], tasks_path: Path | str | None) -> "TaskManager":
    """What knows `tasks`: the folder's own if they suffice, for the harness has thousands to read through."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("tasks need lm-evaluation-harness: pip install 'lemoe[harness]'") from None
    if tasks_path is not None and not Path(tasks_path).is_dir():
        raise InputError(f"{tasks_path}: no such folder of tasks")
    path = None if tasks_path is None else str(tasks_path)
    manager = TaskManager(include_path=path, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise InputError.from_problems("tasks that lm-evaluation-harness does not know:", unknown)
    for name in tasks:
        try:
            manager.load([name])
        except Exception as error:  # a task is a plug-in that runs code and fetches data
            raise InputError(f"task {name}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return manager


def _wrap_model(base: BaseModel, batch_size: int) -> "HFLM":
    from lm_eval.models.huggingface import HFLM

    if is_offloaded(base.embedding):
        raise InputError("tasks need the base's embeddings on a device; the device map keeps them off")
    tokenizer = copy.deepcopy(base.tokenizer)  # the harness changes its padding
    return HFLM(pretrained=base.model, tokenizer=tokenizer, batch_size=batch_size)


HarnessResults = dict[str, Any]


def _run_tasks(model: "HFLM", tasks: Sequence[str], manager: "TaskManager", limit: int | None) -> HarnessResults:
    from lm_eval import simple_evaluate

    results: HarnessResults = simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
    )
    return results


def _pair_results(before: HarnessResults, after: HarnessResults | None) -> Iterator[TaskMetric]:
    last = after or before
    for task, values in before["results"].items():
        for key, value in values.items():
            name, _, how = key.partition(",")
            if not how or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = last["results"][task].get(f"{name}_stderr,{how}")
            yield TaskMetric(
                task=task,
                metric=name if how == "none" else key,
                higher_is_better=before["higher_is_better"].get(task, {}).get(name),
                before=float(value),
                after=None if after is None else float(after["results"][task][key]),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                n=before["n-samples"].get(task, {}).get("effective", 0),
            )
