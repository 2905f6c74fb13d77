"""The keys of anchors: what their prompts mean to the base model, read by a pass that ends at the layer in question."""

from collections.abc import Sequence

from lemoe.base.frozen.layer_inputs import read_layer_inputs
from lemoe.base.loading import BaseModel
from lemoe.routing.anchor.gate import Gate
from lemoe.routing.anchor.meaning import Meaning, Vector


def embed_prompts(
    base: BaseModel,
    meaning: Meaning,
    gate: Gate,
    prompts: Sequence[tuple[int, ...]],
    numbers: Sequence[int],
    batch_tokens: int,
) -> list[Vector]:
    """What each prompt means `[rank]`.

    Args:
        gate: holds the anchors.
        numbers: of each prompt, that of the anchor whose subject it asks about.
    """
    embedded = []
    states = read_layer_inputs(base, int(meaning.layer), prompts, batch_tokens)
    for prompt, number, entered in zip(prompts, numbers, states, strict=True):
        projected, subject = meaning.project(entered).cpu().numpy(), gate.index.subjects[gate.subjects[number]]
        embedded.append(meaning.embed(*gate.summarise(prompt, projected, subject)))
    return embedded
