"""Rounds trained one after another, in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from lemoe.adaptor.state import AdaptorState
from lemoe.base.loading import BaseModel
from lemoe.base.memory import SMALLEST
from lemoe.data.edits import Edit, Round
from lemoe.errors import LemoeError
from lemoe.runs.progress import Listener
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
        listener: Listener,
    ) -> Iterator[tuple[Round, AdaptorState]]:
        """See `Engine`."""
        for round_ in rounds:
            listener.round_started(round_.number, round_.of, len(round_.edits))
            yield round_, train_within_memory(base, round_.edits, settings, before, listener)


def train_within_memory(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: AdaptorState | None, listener: Listener
) -> AdaptorState:
    """One round; where a device runs out of memory after all, again with smaller batches.

    Raises:
        LemoeError: if even the smallest batches do not fit.
    """
    while True:
        try:
            return train_round(base, edits, settings, before, listener.step)
        except torch.OutOfMemoryError:
            if settings.batch_tokens <= SMALLEST:
                raise LemoeError(
                    f"{base.device} has too little memory for this model, even with the smallest batches"
                ) from None
        torch.cuda.empty_cache()
        settings = replace(settings, batch_tokens=max(SMALLEST, settings.batch_tokens // 2))
        listener.note(f"out of memory: trying again with batches of {settings.batch_tokens} tokens")
