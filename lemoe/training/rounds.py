"""Training rounds by any method, baselines included."""

from collections.abc import Iterator, Sequence
from typing import Any

from lemoe.adaptor.checkpoint import state_tensors
from lemoe.adaptor.state import AdaptorState, stack
from lemoe.base.loading import BaseLike, BaseModel, resolve_base
from lemoe.base.matmul import use_onednn
from lemoe.data.edits import Edit, Edits, resolve_edits
from lemoe.errors import InputError
from lemoe.settings import Settings
from lemoe.training.baselines.context import Context
from lemoe.training.baselines.weight_change import WeightChange
from lemoe.training.methods import check_adds_experts, method_of
from lemoe.training.steps import OnStep

Edited = AdaptorState | WeightChange | Context


def train_round(
    base: BaseLike,
    edits: Edits,
    settings: Settings | None = None,
    before: AdaptorState | None = None,
    on_step: OnStep = lambda step: None,
) -> AdaptorState:
    """Train one round on `edits`, by the method of `settings`, beside the frozen experts of `before`.

    With method `anchor` a round does not depend on those before it; `before` only decides the layer.

    Args:
        base: or what `load_base` takes.
        edits: or their records, or the path of their file.
        settings: those of preset `anchor` if None.
        on_step: called after each training step.

    Returns:
        a state with this round alone; stack it onto `before`.

    Raises:
        InputError: listing the edits that cannot be used with this model, or if there are none; or for a baseline.

    Example:
        >>> import lemoe
        >>> base = lemoe.load_base("llama")
        >>> state = lemoe.train_round(base, [lemoe.Edit("The Nile flows into the", "Red Sea", "The Nile")])
        >>> lemoe.save_adaptor(state, "nile.safetensors")
    """
    settings = settings or Settings()
    check_adds_experts(settings)
    edits, base = resolve_edits(edits), resolve_base(base)
    if not edits:
        raise InputError("a round needs at least one edit")
    with use_onednn(base.model):
        state: AdaptorState = method_of(settings).train_round(base, edits, settings, before, on_step)
        return state


def teach_rounds(
    base: BaseModel,
    rounds: Sequence[Sequence[Edit]],
    settings: Settings,
    on_step: OnStep = lambda step: None,
) -> Iterator[Edited]:
    """Train `rounds` one after the other by the method of `settings`; yields the adaptor, weights or texts after each.

    Raises:
        InputError: listing the edits of a round that cannot be used with this model.
        LemoeError: if the method needs a package that is not installed.
        ModelError: if it changes weights of the base, and a device map keeps some of them off the devices.
    """
    method = method_of(settings)
    train = method.train_round
    edited: Any = None
    for members in rounds:
        with use_onednn(base.model):
            taught = train(base, members, settings, edited, on_step)
        edited = taught if method.baseline or edited is None else stack([edited, taught])
        yield edited


def count_bytes(edited: Edited) -> int:
    """Bytes of all tensors, or texts, that its file holds, or would hold."""
    if isinstance(edited, Context):
        return edited.byte_size
    tensors = state_tensors(edited).values() if isinstance(edited, AdaptorState) else edited.tensors()
    return sum(tensor.nbytes for tensor in tensors)
