"""Greedy generation in batches, in which no answer depends on the others."""

from collections.abc import Iterator, Sequence

import torch

from lemoe.base.loading import BaseModel
from lemoe.base.tokens import batch_invariant_width

Tokens = tuple[int, ...]


def generate_answers(
    base: BaseModel, prompts: Sequence[Tokens], tokens: int, batch_tokens: int, *, suppress_end: bool = False
) -> list[Tokens]:
    """The model's greedy answers of `tokens` tokens; see `generate_batch`."""
    answers: dict[Tokens, Tokens] = {}
    for batch in prompt_batches(dict.fromkeys(prompts, tokens), batch_tokens):
        answers.update(zip(batch, generate_batch(base, batch, tokens, suppress_end=suppress_end), strict=True))
    return [answers[prompt] for prompt in prompts]


def prompt_batches(wanted: dict[Tokens, int], batch_tokens: int) -> Iterator[list[Tokens]]:
    """Prompts that are padded to one width, those with the most tokens to write first, in batches."""
    widths: dict[int, list[Tokens]] = {}
    for prompt in sorted(wanted, key=lambda prompt: (-wanted[prompt], prompt)):
        widths.setdefault(batch_invariant_width(len(prompt)), []).append(prompt)
    for width, prompts in sorted(widths.items(), reverse=True):
        size = max(1, batch_tokens // (width + wanted[prompts[0]]))
        for first in range(0, len(prompts), size):
            yield prompts[first : first + size]


@torch.no_grad()
def generate_batch(
    base: BaseModel, prompts: Sequence[Tokens], tokens: int, *, suppress_end: bool = False
) -> list[Tokens]:
    """Greedy answers of at most `tokens` tokens, up to and with the model's end token, prompts padded on the left.

    Args:
        suppress_end: never choose the end token, so that all `tokens` are written.
    """
    width = batch_invariant_width(max(map(len, prompts)))
    ids = torch.full((len(prompts), width), base.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = base.model.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        max_new_tokens=tokens,
        min_new_tokens=tokens if suppress_end else None,
        do_sample=False,
        num_beams=1,
        pad_token_id=base.pad_token_id,
    )
    return [
        tuple(row) if suppress_end else _until_end(tuple(row), base.eos_token_id) for row in output[:, width:].tolist()
    ]


def _until_end(tokens: Tokens, end: int) -> Tokens:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
