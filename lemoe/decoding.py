"""What a model writes: greedy decoding of many prompts at once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lemoe.tokens import Passage

if TYPE_CHECKING:
    from lemoe.models import BaseModel


@torch.no_grad()
def write_greedily(base: "BaseModel", passages: Sequence[Passage], tokens: int) -> list[tuple[int, ...]]:
    """Answers of at most `tokens` tokens, up to and with the model's end token, prompts padded on the left."""
    width = max(len(passage.prompt) for passage in passages)
    ids = torch.full((len(passages), width), base.pad_token)
    mask = torch.zeros_like(ids)
    for row, passage in enumerate(passages):
        ids[row, width - len(passage.prompt) :] = torch.tensor(passage.prompt)
        mask[row, width - len(passage.prompt) :] = 1
    output = base.model.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=base.pad_token,
    )
    return [_until_end(tuple(row), base.end_token) for row in output[:, width:].tolist()]


def _until_end(tokens: tuple[int, ...], end: int) -> tuple[int, ...]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
