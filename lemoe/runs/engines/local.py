"""Rounds trained one after another, in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from lemoe.adaptor.state import AdaptorState
from lemoe.base.loading import BaseModel
from lemoe.base.memory import MIN_BATCH_TOKENS
from lemoe.data.edits import Edit, Round
from lemoe.errors import LemoeError
from lemoe.runs.progress import ProgressCallback
from lemoe.settings import Settings
from lemoe.training.rounds import train_round


class LocalEngine:
    """Trains in this process, on the base's device."""

    def train(
        self,
        base: BaseModel,
        rounds: Sequence[Round],
        settings: Settings,
        before: AdaptorState | None,
        progress: ProgressCallback,
    ) -> Iterator[tuple[Round, AdaptorState]]:
        """See `Engine`."""
        for round_ in rounds:
            progress.round_started(round_.number, round_.total, len(round_.edits))
            yield round_, train_within_memory(base, round_.edits, settings, before, progress)


def train_within_memory(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: AdaptorState | None, progress: ProgressCallback
) -> AdaptorState:
    """Train one round; if a device runs out of memory, again with smaller batches.

    Raises:
        LemoeError: if even the smallest batches do not fit.
    """
    while True:
        try:
            return train_round(base, edits, settings, before, progress.step)
        except torch.OutOfMemoryError:
            if settings.batch_tokens <= MIN_BATCH_TOKENS:
                raise LemoeError(
                    f"{base.device} has too little memory for this model, even with the smallest batches"
                ) from None
        torch.cuda.empty_cache()
        settings = replace(settings, batch_tokens=max(MIN_BATCH_TOKENS, settings.batch_tokens // 2))
        progress.note(f"out of memory: trying again with batches of {settings.batch_tokens} tokens")
