"""`lemoe eval --tasks`: general ability, on tasks of lm-evaluation-harness."""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemoe_cli.options import FILE, combine_options, measuring_option

if TYPE_CHECKING:
    from lemoe.adaptor.checkpoint import AdaptorFile
    from lemoe.base.loading import BaseModel
    from lemoe.evaluation.harness import TaskMetric

tasks_options: Callable[[Any], Any] = combine_options(
    measuring_option("--tasks", metavar="NAME[,NAME]", help="Tasks of lm-evaluation-harness too (extra `harness`)."),
    measuring_option("--tasks-path", type=FILE, help="Folder of further tasks (YAML)."),
)


def measure_tasks(
    base: "BaseModel", adaptor: "AdaptorFile | None", options: Mapping[str, Any], *, allow_mismatch: bool, quiet: bool
) -> "list[TaskMetric]":
    """The metrics of the tasks that the options name; none if they name none."""
    names = [name.strip() for name in (options["tasks"] or "").split(",") if name.strip()]
    if not names:
        return []
    from lemoe.evaluation.harness import TaskOptions, evaluate_tasks

    path: Path | None = options["tasks_path"]
    with redirect_stderr(io.StringIO()) if quiet else nullcontext():  # progress bars that no setting turns off
        return evaluate_tasks(
            base,
            adaptor,
            names,
            TaskOptions(tasks_path=path, expert_cache=options["expert_cache"], allow_base_mismatch=allow_mismatch),
        )


def show_tasks(metrics: "Sequence[TaskMetric]") -> None:
    """A table of them, if there are any."""
    from lemoe_cli.ui import print_table, results

    if not metrics:
        return
    results.print()
    rows = []
    for metric in metrics:
        spread = "" if metric.stderr is None else f" ±{metric.stderr:.3f}".replace("±0.", "±.")
        before, after = f"{metric.before:.3f}", "" if metric.after is None else f"{metric.after:.3f}"
        cells = (before, after + spread) if after else (before + spread, "")
        rows.append((metric.task, metric.metric, *cells, str(metric.n)))
    print_table(
        "Tasks of lm-evaluation-harness (± standard error)", ("", "metric", "before", "after", "n"), rows, left=2
    )
