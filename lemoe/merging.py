"""Stacking adaptors of one base into one: what was trained apart works together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lemoe.adaptor import AdaptorState, stack
from lemoe.checkpoint import load_adaptor, save_adaptor
from lemoe.errors import AdaptorError

OnConflict = Literal["latest", "error"]


def merge(
    paths: Sequence[Path | str], output: Path | str, *, on_conflict: OnConflict = "latest", overwrite: bool = False
) -> AdaptorState:
    """Stack the adaptor files `paths`, in order, and write the result to `output`; equal rounds count once.

    Args:
        on_conflict: where edits of several adaptors answer the same question, let the `latest` answer (the others
            stay in the file and are listed in `AdaptorState.replaced`), or take it as an `error`.

    Raises:
        AdaptorError: if a file is not a valid adaptor, or bases, layers or methods differ, all listed; or if edits
            supersede each other and `on_conflict` is `error`.
        OutputError: if the output exists or cannot be written.
    """
    states = [load_adaptor(path) for path in paths]
    try:
        merged = stack(states)
    except AdaptorError as error:
        names = "".join(f"\n  adaptor {number} is {path}" for number, path in enumerate(paths, 1))
        raise AdaptorError(f"{error}{names}") from None
    known = {pair for state in states for pair in state.replaced}
    fresh = [pair for pair in merged.replaced if pair not in known]
    if fresh and on_conflict == "error":
        pairs = [f"edit {earlier.id} asks what {later.id} answers anew" for earlier, later in fresh]
        raise AdaptorError("\n  ".join([f"{len(fresh)} edit(s) would be superseded:", *pairs[:20]]))
    save_adaptor(merged, output, overwrite=overwrite)
    return merged
