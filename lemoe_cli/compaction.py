"""`lemoe merge --compact`: what compaction tried, lost and saved."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemoe_cli.options import open_base

if TYPE_CHECKING:
    from lemoe.adaptor.merging import Merged
    from lemoe.runs.compaction import Compacted


def compacted(
    read: "Callable[[], Merged]", output: Path | None, tolerance: float, options: Mapping[str, Any], *, overwrite: bool
) -> "Merged":
    """The stack that `read` gives, compacted, shown, and written to `output`; ends with 1 if too much is lost."""
    from lemoe.adaptor.checkpoint import save_adaptor
    from lemoe.data.files import check_free, remove_scratch
    from lemoe.runs.compaction import compact
    from lemoe_cli.ui import say, stage

    if output is not None:
        check_free(output, overwrite=overwrite)
    merged = read()
    base = open_base({**options, "device_map": None, "dtype": "auto"}, quiet=False)
    with stage("compacting", quiet=False) as notify:
        outcome = compact(base, merged.state, tolerance=tolerance, notify=notify)
    _show(outcome)
    if outcome.state is None:
        say(f"nothing is written: more than --tolerance {tolerance:g} would be lost")
        sys.exit(1)
    if output is None:
        return replace(merged, state=outcome.state)
    remove_scratch(output.parent, output.name)
    save_adaptor(outcome.state, output, overwrite=overwrite)
    return replace(merged, state=outcome.state, size=output.stat().st_size)


def _show(outcome: "Compacted") -> None:
    from lemoe_cli.ui import say, size_text, table

    measures = asdict(outcome.before)
    rows = [("as it is", size_text(outcome.size), *(f"{share:.3f}" for share in measures.values()), "")]
    for trial in outcome.trials:
        figures = (f"{share:.3f}" for share in astuple(trial.quality))
        loss = outcome.before.loss(trial.quality)
        rows.append((f"{trial.neurons:g} neurons an edit", size_text(trial.size), *figures, f"{loss:.3f}"))
    table("Share of whole answers given", ("experts", "size", *measures, "loss"), rows)
    if outcome.left_out:
        say(f"{outcome.left_out} superseded edit(s) are left out for good")
