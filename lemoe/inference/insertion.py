"""An adaptor inserted into a base model that it fits, and taken out again."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.adaptor.state import AdaptorState, check_base
from lemoe.base.frozen import FrozenBatch, read_layer_inputs
from lemoe.base.loading import BaseLike, BaseModel, resolve_base
from lemoe.base.structure import FFNSite
from lemoe.base.tokens import Passage
from lemoe.errors import AdaptorError
from lemoe.inference.expert_cache import ExpertCache
from lemoe.inference.live_adaptor import ExpertSource, LiveAdaptor
from lemoe.routing.router import Explanation, Routing


class InsertedAdaptor(LiveAdaptor):
    """An adaptor state at work in a base model.

    `generate` marks the prompt itself, for preset `paper`, which needs to know it; for a forward pass over prompt and
    answer together, say where the prompt ends with `mark_prompts`.

    Attributes:
        state: the adaptor.
        site: the edited FFN, whose output the experts add to.
        router: its router at work; `router.explain` tells why a prompt takes its route.

    Example:
        >>> import lemoe
        >>> edited = lemoe.insert(lemoe.load_base("llama"), "edits.lemoe")
        >>> prompt = edited.base.tokenizer("The Eiffel Tower is located in the city of").input_ids
        >>> edited.acts_on(prompt)
        True
        >>> edited.explain([prompt])[0].edit  # its number in `edited.state.edits`
        0
        >>> edited.remove()
        >>> edited.removed
        True
    """

    site: FFNSite
    _wrapped = ("generate", "save_pretrained")  # the model's methods that are called through the adaptor's

    def __init__(
        self,
        base: BaseModel,
        state: AdaptorState,
        *,
        experts: ExpertSource | None = None,
        dormant: bool = False,
        allow_base_mismatch: bool = False,
    ):
        """Insert `state` into `base`.

        Args:
            experts: the state's experts, where they are not in the state itself.
            dormant: they act only where `acting` is open, so that a base can hold several adaptors. Preset `paper` is
                then told its prompts by calling `generate` of the adaptor.
            allow_base_mismatch: insert it into a base that it was not made for, as long as the shapes fit.

        Raises:
            AdaptorError: if the state was made for another base model, listing the differences, or if another
                adaptor is inserted already.
        """
        check_base(base, state, allow=allow_base_mismatch)
        if any(name in base.model.__dict__ for name in self._wrapped):
            raise AdaptorError("an adaptor is inserted already; remove it first, or stack the two and insert the stack")
        self.base = base
        self.state = state
        site = base.ffn_site(state.base.layer, state.settings.layer_path)
        router = state.router.to_live(base, state.settings)
        if router.layer_read is not None and router.layer_read > state.base.layer:
            raise AdaptorError(
                f"the adaptor reads layer {router.layer_read}, above layer {state.base.layer} that it edits"
            )
        layer_read = None if router.layer_read is None else base.layers[router.layer_read]
        experts = experts or state.experts.to(base.device)
        super().__init__(base.decoder, site, router, experts, layer_read, owner=state, dormant=dormant)
        for name in () if dormant else self._wrapped:
            base.model.__dict__[name] = functools.partial(getattr(self, name), getattr(base.model, name))

    def __repr__(self) -> str:
        where = "removed from" if self.removed else "inserted into"
        return f"InsertedAdaptor({self.state.brief}, {where} {self.base.source.name!r} at {self.site.path})"

    def remove(self) -> None:
        super().remove()
        for name in self._wrapped:
            wrapper = self.base.model.__dict__.get(name)
            if isinstance(wrapper, functools.partial) and getattr(wrapper.func, "__self__", None) is self:
                del self.base.model.__dict__[name]

    def save_pretrained(self, save_pretrained: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the model's own `save_pretrained`, while bypassed: it writes the base alone."""
        if not self._thread.bypass:
            raise AdaptorError(
                "save_pretrained would write the base without the edits, which are not in its weights: save the "
                "adaptor, or write both as one folder with lemoe.exporting.folder.export_model; while "
                "`bypassed()`, or after `remove()`, it writes the base"
            )
        return save_pretrained(*args, **kwargs)

    def __enter__(self) -> "InsertedAdaptor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def route_passages(
        self, passages: Sequence[Passage], batch_tokens: int = 4096, groups: Sequence[int] | None = None
    ) -> list[Routing]:
        """The route that each passage takes, explained.

        Args:
            batch_tokens: padded tokens that run through the layers up to the one that the router reads.
            groups: one number per passage; the route of a passage then depends on its group alone, bit for bit.
        """
        hidden = self._read_hidden([passage.input_ids for passage in passages], batch_tokens, groups)
        return [
            _name_acting(self.router.route_text(passage.input_ids, len(passage.prompt), states), len(passage.prompt))
            for passage, states in zip(passages, hidden, strict=True)
        ]

    def explain(
        self,
        prompts: Sequence[Sequence[int]],
        batch_tokens: int = 4096,
        *,
        answers: Sequence[Sequence[int]] | None = None,
    ) -> list[Explanation]:
        """Why each prompt (token ids) takes its route.

        Args:
            answers: what is written behind each, in which experts may act too; nothing by default.
        """
        written = answers if answers is not None else [()] * len(prompts)
        passages = [Passage(tuple(prompt), tuple(answer)) for prompt, answer in zip(prompts, written, strict=True)]
        return [route.explained[0] for route in self.route_passages(passages, batch_tokens)]

    def acts_on(self, ids: Sequence[int]) -> bool:
        """Whether any expert acts anywhere on a text (token ids)."""
        routing = self.route_passages([Passage(tuple(ids))], len(ids))[0]
        return bool((routing.experts >= 0).any())

    def _read_hidden(
        self, texts: Sequence[Sequence[int]], batch_tokens: int, groups: Sequence[int] | None
    ) -> Sequence[Tensor | None]:
        """The states `[seq, hidden]` of each text that the router reads; None where it reads none."""
        if self.router.layer_read is None:
            return [None] * len(texts)
        with self.bypassed():
            return read_layer_inputs(self.base, self.router.layer_read, texts, batch_tokens, groups)

    @torch.no_grad()
    def replay(self, frozen: FrozenBatch, routings: Sequence[Routing]) -> Tensor:
        """Last hidden states `[targets, hidden]` of a frozen batch with the routed experts at work.

        Args:
            routings: of each row by itself. The experts run row by row, so that no row depends on the others.
        """
        delta = torch.zeros(frozen.inputs.shape, device=frozen.inputs.device)
        for row, routing in enumerate(routings):
            columns = routing.experts.shape[1]
            change = self.delta(frozen.inputs[row : row + 1, :columns], routing)
            if change is not None:
                delta[row, :columns] = change[0]
        return frozen.replay(delta)


def inserted_adaptor(base: BaseModel) -> InsertedAdaptor | None:
    """The adaptor inserted into `base`; None if there is none, or only dormant ones."""
    wrapper = base.model.__dict__.get("generate")
    owner = getattr(wrapper.func, "__self__", None) if isinstance(wrapper, functools.partial) else None
    return owner if isinstance(owner, InsertedAdaptor) else None


def insert(
    base: BaseLike,
    adaptor: AdaptorState | AdaptorFile | Path | str,
    *,
    expert_cache: int | None = None,
    dormant: bool = False,
    allow_base_mismatch: bool = False,
) -> InsertedAdaptor:
    """Insert an adaptor into `base`; `remove` takes it out, or the end of `with lemoe.insert(...):`.

    Args:
        base: or what `load_base` takes; it is then the `base` of what is returned.
        adaptor: a state, or the path of its file or of a run's folder.
        expert_cache: bytes of experts to cache in memory; the others stay in the file until they are needed. If
            None, all are read at once.
        dormant: the experts act only where `acting` of the inserted adaptor is open; a base can hold several such.
        allow_base_mismatch: insert it into a base that it was not made for, as long as the shapes fit.

    Raises:
        AdaptorError: if the file is not a valid adaptor, or was made for another base model.

    Example:
        >>> import lemoe
        >>> base = lemoe.load_base("llama")
        >>> with lemoe.insert(base, "edits.lemoe") as edited:
        ...     inputs = base.tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt")
        ...     ids = base.model.generate(**inputs, max_new_tokens=8)  # transformers' own generate, edited
        >>> edited.removed
        True
    """
    given: dict[str, Any] = {"dormant": dormant, "allow_base_mismatch": allow_base_mismatch}
    base = resolve_base(base)
    if isinstance(adaptor, AdaptorState):
        return InsertedAdaptor(base, adaptor, **given)
    file = adaptor if isinstance(adaptor, AdaptorFile) else AdaptorFile(adaptor)
    if expert_cache is None:
        return InsertedAdaptor(base, file.load(), **given)
    file.check_hash()
    experts = ExpertCache(file, base.device, expert_cache)
    return InsertedAdaptor(base, file.state, experts=experts, **given)


def _name_acting(routing: Routing, prompt: int) -> Routing:
    """The routing of one text whose first `prompt` tokens are its prompt, with all experts that act in its answer."""
    acting = routing.experts[0, prompt - 1 :].flatten().tolist()
    acted = tuple(dict.fromkeys(expert for expert in acting if expert >= 0))
    return replace(routing, explained=tuple(replace(each, acted=acted) for each in routing.explained))
