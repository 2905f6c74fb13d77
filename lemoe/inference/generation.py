"""What a model writes by itself, greedily, in batches of which no answer depends on the others."""

from collections.abc import Iterator, Sequence

import torch

from lemoe.base.loading import BaseModel
from lemoe.base.tokens import steady_width

Tokens = tuple[int, ...]


def generate_answers(
    base: BaseModel, prompts: Sequence[Tokens], tokens: int, batch_tokens: int, *, hold_end: bool = False
) -> list[Tokens]:
    """The model's greedy answers of `tokens` tokens; see `generate_batch`."""
    answers: dict[Tokens, Tokens] = {}
    for alike in prompt_batches(dict.fromkeys(prompts, tokens), batch_tokens):
        answers.update(zip(alike, generate_batch(base, alike, tokens, hold_end=hold_end), strict=True))
    return [answers[prompt] for prompt in prompts]


def prompt_batches(wanted: dict[Tokens, int], batch_tokens: int) -> Iterator[list[Tokens]]:
    """Prompts that are padded to one width, those with the most tokens to write first, in batches."""
    widths: dict[int, list[Tokens]] = {}
    for prompt in sorted(wanted, key=lambda prompt: (-wanted[prompt], prompt)):
        widths.setdefault(steady_width(len(prompt)), []).append(prompt)
    for width, prompts in sorted(widths.items(), reverse=True):
        size = max(1, batch_tokens // (width + wanted[prompts[0]]))
        for first in range(0, len(prompts), size):
            yield prompts[first : first + size]


@torch.no_grad()
def generate_batch(base: BaseModel, prompts: Sequence[Tokens], tokens: int, *, hold_end: bool = False) -> list[Tokens]:
    """Greedy answers of at most `tokens` tokens, up to and with the model's end token, prompts padded on the left.

    Args:
        hold_end: hold the end token back, so that all `tokens` are written.
    """
    width = steady_width(max(map(len, prompts)))
    ids = torch.full((len(prompts), width), base.pad_token)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = base.model.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        max_new_tokens=tokens,
        min_new_tokens=tokens if hold_end else None,
        do_sample=False,
        num_beams=1,
        pad_token_id=base.pad_token,
    )
    return [tuple(row) if hold_end else _until_end(tuple(row), base.end_token) for row in output[:, width:].tolist()]


def _until_end(tokens: Tokens, end: int) -> Tokens:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
