"""Stacking adaptors of one base into one: what was trained apart works together."""

from collections.abc import Sequence
from pathlib import Path

from lemoe.adaptor import AdaptorState, stack
from lemoe.checkpoint import load_adaptor, save_adaptor
from lemoe.errors import AdaptorError


def merge(paths: Sequence[Path | str], output: Path | str, *, overwrite: bool = False) -> AdaptorState:
    """Stack the adaptor files `paths`, in order, and write the result to `output`; equal rounds count once.

    Raises:
        AdaptorError: if a file is not a valid adaptor, or bases, layers or methods differ, all listed.
        OutputError: if the output exists or cannot be written.
    """
    states = [load_adaptor(path) for path in paths]
    try:
        merged = stack(states)
    except AdaptorError as error:
        names = "".join(f"\n  adaptor {number} is {path}" for number, path in enumerate(paths, 1))
        raise AdaptorError(f"{error}{names}") from None
    save_adaptor(merged, output, overwrite=overwrite)
    return merged
