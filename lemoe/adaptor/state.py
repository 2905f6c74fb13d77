"""Adaptor states: experts, their routes and where they came from; values that can be stacked and saved."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from lemoe.adaptor.experts import Experts
from lemoe.base.equality import TensorEquality
from lemoe.base.fingerprint import Fingerprint
from lemoe.data.counting import edits_in_rounds
from lemoe.data.edits import Edit, combine_digests, digest_edits, edit_label
from lemoe.errors import AdaptorError
from lemoe.routing.registry import ROUTERS
from lemoe.routing.router import Lineage, Router, split_evenly
from lemoe.settings import Settings

if TYPE_CHECKING:
    from lemoe.base.loading import BaseModel


GATE_SETTINGS = {"gate", "gate_probability"}
# Of methods that make no adaptors:
BASELINE_SETTINGS = {"change_share", "demonstrations", "merge_share", "radius", "retrieval_threshold"}


@dataclass(frozen=True, slots=True)
class TaughtEdit:
    """An edit that an expert was trained on: its id, and the digest of its prompt, target and subject.

    Attributes:
        prompt, target: its text; empty where the round's record has none.
        round: number, in its stack, of the round that holds it, from 1; 0 outside of a stack.
    """

    id: str
    digest: str
    prompt: str = field(default="", compare=False)
    target: str = field(default="", compare=False)
    round: int = field(default=0, compare=False)

    @property
    def label(self) -> str:
        """Its id with its text, for messages; with its digest where the text is not known."""
        if not self.prompt:
            return f"{self.id} (digest {self.digest[:12]})"
        return edit_label(self.id, self.prompt, self.target)


@dataclass(frozen=True)
class RoundRecord:
    """Where a round's experts came from.

    Attributes:
        id: hash of what the round was trained on and with; equal rounds have equal ids.
        parent: id of the round before, whose experts were frozen while this one was trained; None for the first, and
            where rounds do not depend on each other.
        depth: its position in that line of rounds, from 1.
        experts: how many it has: one for the round, one for each edit, or fewer that share its edits; see `parts`.
        ids: name of each edit it holds.
        edits: digest of each.
        edits_sha256: hash over those.
        seed: of the run.
        loss: mean cross entropy (nats) of its target tokens when training ended.
        end_loss: the same of the token that ends each answer; None where endings are not taught.
        steps: training steps it took.
        retried: how many edits missed their target at first and were trained further.
        missed: names of those that failed the final reliability check; None where there is none.
        routed: how many of its edits took the route to its own expert when training ended.
        dropped: digests, sorted, of edits that it was trained on too and that were dropped since.
        base_differences: how the model that it was trained on differed from the adaptor's base, if that was allowed.
        compacted_from: id of the round whose experts were merged into these; None for a round as it was trained.
        prompts, targets: the text of each edit, where its file discloses it in any case; else, and in files of format
            1, empty.
    """

    id: str
    parent: str | None
    depth: int
    experts: int
    ids: tuple[str, ...]
    edits: tuple[str, ...]
    edits_sha256: str
    seed: int
    loss: float
    end_loss: float | None
    steps: int
    retried: int
    missed: tuple[str, ...] | None
    routed: int
    dropped: tuple[str, ...] = ()
    base_differences: tuple[str, ...] = ()
    compacted_from: str | None = None
    prompts: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    @property
    def one_expert_per_edit(self) -> bool:
        """Whether each edit has an expert of its own."""
        return self.experts == len(self.edits)

    @property
    def edit_ranges(self) -> list[range]:
        """The indices of the edits that each expert holds."""
        return split_evenly(len(self.edits), self.experts)

    def taught_edits(self, number: int) -> list[TaughtEdit]:
        """Its edits, as those of round `number` of a stack."""
        prompts, targets = (texts or ("",) * len(self.edits) for texts in (self.prompts, self.targets))
        described = zip(self.ids, self.edits, prompts, targets, strict=True)
        return [TaughtEdit(*each, round=number) for each in described]

    @property
    def lineages(self) -> list[Lineage]:
        """The lineage of each of its experts."""
        return Lineage.from_round(self.id, self.parent, self.depth, self.experts, len(self.edits))

    def drop_experts(self, experts: Collection[int]) -> "RoundRecord":
        """The record without its experts at these indices and the edits that they hold."""
        dropped = {index for expert, part in enumerate(self.edit_ranges) if expert in experts for index in part}
        remaining = [index for index in range(len(self.edits)) if index not in dropped]
        ids, edits = tuple(self.ids[index] for index in remaining), tuple(self.edits[index] for index in remaining)
        prompts, targets = (
            tuple(texts[index] for index in remaining) if texts else () for texts in (self.prompts, self.targets)
        )
        names = frozenset(ids)
        return replace(
            self,
            experts=self.experts - len(experts),
            ids=ids,
            edits=edits,
            edits_sha256=combine_digests(edits),
            missed=None if self.missed is None else tuple(name for name in self.missed if name in names),
            routed=min(self.routed, len(remaining)),
            dropped=tuple(sorted({*self.dropped, *(self.edits[index] for index in dropped)})),
            prompts=prompts,
            targets=targets,
        )


def round_id(
    base: Fingerprint, chat_template: str | None, settings: Settings, edits: Sequence[Edit], parent: str | None
) -> str:
    """Hash of all that decides a round's tensors: base, chat template, settings, edits in order, the round before.

    `batch_tokens` and the device depend on the machine and take no part, nor do settings of a gate where there is none
    or of baselines that make no adaptors.
    """
    without = {"batch_tokens"} | BASELINE_SETTINGS | (set() if ROUTERS[settings.method].gated else GATE_SETTINGS)
    decisive = {name: value for name, value in settings.as_dict().items() if name not in without}
    weights = [base.ffn_sha256, base.weights_sha256, base.tokenizer_sha256, base.ffn]
    if chat_template:
        weights.append(chat_template)
    made_of = [*weights, decisive, digest_edits(edits), parent]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class AdaptorState(TensorEquality):
    """Everything an adaptor file holds: the record of each round, its experts end to end, and their router.

    `edits`, `edits_by_expert` and `expert_spans` are cached: some 210 bytes per edit.

    Example:
        >>> import lemoe
        >>> state = lemoe.load_adaptor("edits.lemoe")
        >>> [edit.label for edit in state.edits][:1]
        ['eiffel-tower-city (The Eiffel Tower is located in the city of -> Rome)']
        >>> len(state.rounds)
        1
    """

    base: Fingerprint
    settings: Settings
    rounds: tuple[RoundRecord, ...]
    experts: Experts
    router: Router

    def __repr__(self) -> str:
        return f"AdaptorState({self.brief}, layer {self.base.layer} of {self.base.name!r})"

    @property
    def brief(self) -> str:
        """Its preset and how much it holds, in a few words."""
        edits, rounds = sum(len(record.edits) for record in self.rounds), len(self.rounds)
        return f"preset {self.settings.method}, {edits_in_rounds(edits, rounds)}"

    @property
    def lineages(self) -> list[Lineage]:
        """Where each expert's round stands in its lineage."""
        return [lineage for record in self.rounds for lineage in record.lineages]

    @cached_property
    def edits(self) -> tuple[TaughtEdit, ...]:
        """All edits, in the order of the experts that hold them; an edit's index is its number."""
        return tuple(edit for number, record in enumerate(self.rounds, 1) for edit in record.taught_edits(number))

    @cached_property
    def edits_by_expert(self) -> tuple[tuple[TaughtEdit, ...], ...]:
        """The edits that each expert holds."""
        ends = list(accumulate(len(record.edits) for record in self.rounds))
        rounds = [
            (record, self.edits[end - len(record.edits) : end]) for end, record in zip(ends, self.rounds, strict=True)
        ]
        if self.router.shared:
            return tuple(edits for record, edits in rounds for _ in range(record.experts))
        return tuple(edits[part.start : part.stop] for record, edits in rounds for part in record.edit_ranges)

    def experts_holding(self, numbers: Collection[int]) -> list[int]:
        """The experts that hold the edits of these numbers, each alone.

        Raises:
            AdaptorError: if one of them shares its expert with other edits.
        """
        owners = [bisect_right(self._cumulative_edits, number) for number in numbers]
        for number, owner in zip(numbers, owners, strict=True):
            if others := len(self.edits_by_expert[owner]) - 1:
                name = self.edits[number].label
                raise AdaptorError(f"edit {name} shares an expert with {others} other edits; drop the whole round")
        return owners

    @cached_property
    def _cumulative_edits(self) -> list[int]:
        """How many edits the experts up to and with each hold."""
        return list(accumulate(map(len, self.edits_by_expert)))

    @property
    def experts_by_edit(self) -> dict[str, frozenset[int]]:
        """The experts that hold each edit, by its digest."""
        experts: dict[str, frozenset[int]] = {}
        for expert, edits in enumerate(self.edits_by_expert):
            for edit in edits:
                experts[edit.digest] = experts.get(edit.digest, frozenset()) | {expert}
        return experts

    @property
    def superseded_edits(self) -> list[tuple[TaughtEdit, TaughtEdit]]:
        """Edits that a later one with the same question supersedes, each with that one; the later one answers."""
        edits = self.edits
        return [(edits[earlier], edits[later]) for earlier, later in self.router.superseded().items()]

    @property
    def answering_digests(self) -> frozenset[str]:
        """Digests of the edits that answer: all but the superseded."""
        superseded = self.router.superseded()
        return frozenset(edit.digest for number, edit in enumerate(self.edits) if number not in superseded)

    @cached_property
    def expert_spans(self) -> tuple[range, ...]:
        """The experts of each round."""
        ends = list(accumulate(record.experts for record in self.rounds))
        return tuple(range(end - record.experts, end) for end, record in zip(ends, self.rounds, strict=True))

    def select_rounds(self, rounds: Sequence[int]) -> "AdaptorState":
        """The state with only the rounds at these indices."""
        spans = self.expert_spans
        experts = [expert for index in rounds for expert in spans[index]]
        return replace(
            self,
            rounds=tuple(self.rounds[index] for index in rounds),
            experts=self.experts.select(experts),
            router=self.router.select(experts),
        )

    def drop_experts(self, experts: Collection[int]) -> "AdaptorState":
        """The state without these experts, as if it had never had them.

        Raises:
            AdaptorError: if a remaining round was trained beside a dropped one, or if no round remains.
        """
        dropped = set(experts)
        records, remaining = [], []
        for record, span in zip(self.rounds, self.expert_spans, strict=True):
            indices = {expert - span.start for expert in span if expert in dropped}
            if len(indices) < len(span):
                records.append(record.drop_experts(indices) if indices else record)
                remaining += [expert for expert in span if expert not in dropped]
        if not records:
            raise AdaptorError("nothing would be left of the adaptor")
        record_ids = {record.id for record in records}
        orphans = [
            record.id[:12] for record in records if record.parent is not None and record.parent not in record_ids
        ]
        if orphans:
            raise AdaptorError(f"trained beside a round that would be dropped: {', '.join(orphans)}; drop these too")
        stack, router = self.experts.select(remaining), self.router.select(remaining)
        return replace(self, rounds=tuple(records), experts=stack, router=router)


def superseded_note(earlier: TaughtEdit, later: TaughtEdit) -> str:
    """The message about an edit that a later one supersedes; both may have one id."""
    return (
        f"edit {earlier.label} of round {earlier.round} is superseded: "
        f"{later.label} of round {later.round} answers its question now"
    )


def stack(states: Sequence[AdaptorState]) -> AdaptorState:
    """One state with the rounds of all `states`, in order; a round that comes twice counts once.

    Of edits with one prompt the latest answers; that they ask the same in other words, `merge_in_memory` finds.

    Raises:
        AdaptorError: if bases, layers or methods differ, listing the differences; or if one state holds a round whole
            and another without some of its edits, or as it was trained and compacted.

    Example:
        >>> import lemoe
        >>> base = lemoe.load_base("llama")
        >>> nile = lemoe.train_round(base, [{"prompt": "The Nile flows into the", "target": "Red Sea"}])
        >>> both = lemoe.stack([lemoe.load_adaptor("edits.lemoe"), nile])
        >>> len(both.rounds)
        2
    """
    if not states:
        raise AdaptorError("nothing to stack: no adaptor given")
    differences = [
        f"adaptor {number}: {difference}"
        for number, other in enumerate(states[1:], 2)
        for difference in _state_differences(states[0], other)
    ]
    if differences:
        raise AdaptorError("\n  ".join(["these adaptors cannot be stacked; compared with the first:", *differences]))
    parts = _drop_repeated_rounds(states)
    return replace(
        states[0],
        rounds=tuple(record for part in parts for record in part.rounds),
        experts=Experts.stack([part.experts for part in parts]),
        router=type(parts[0].router).stack([(part.router, part.lineages) for part in parts]),
    )


def _drop_repeated_rounds(states: Sequence[AdaptorState]) -> list[AdaptorState]:
    seen: dict[str, RoundRecord] = {}
    parts = []
    for state in states:
        origins = [record.compacted_from or record.id for record in state.rounds]
        for record, origin in zip(state.rounds, origins, strict=True):
            _check_repeated(seen.get(origin, record), record)
        new = [index for index, origin in enumerate(origins) if origin not in seen]
        seen.update(zip(origins, state.rounds, strict=True))
        parts.append(state if len(new) == len(state.rounds) else state.select_rounds(new))
    return [part for part in parts if part.rounds]


def _check_repeated(one: RoundRecord, other: RoundRecord) -> None:
    """Refuse a round that comes in two forms."""
    if one.id != other.id:
        raise AdaptorError(
            f"rounds {one.id[:12]} and {other.id[:12]} hold the same edits, one of them compacted; leave one out"
        )
    if one.dropped != other.dropped:
        raise AdaptorError(
            f"round {other.id[:12]} comes twice, without {len(other.dropped)} of its edits and without "
            f"{len(one.dropped)}; drop the same from both, or leave one out"
        )


def check_base(base: "BaseModel", state: AdaptorState, *, allow: bool = False) -> tuple[str, ...]:
    """Refuse a state that was made for another base, or, with `allow`, only one that does not fit into this one.

    Returns:
        the differences, with `allow`.

    Raises:
        AdaptorError: listing the differences.
    """
    actual = base.fingerprint(state.base.layer, state.settings.layer_path)
    differences = state.base.describe_differences(actual)
    if differences and not (allow and state.base.is_compatible(actual)):
        raise AdaptorError(
            f"this adaptor was made for another base model ({state.base.name}) than {base.source.name}:\n  "
            + "\n  ".join(differences)
        )
    return tuple(differences)


_COMPATIBLE_SETTINGS = ("method", "top_k", "router_width", "gate_probability", "gate_conflict", "gate_slack")


def check_settings(start: AdaptorState, settings: Settings) -> None:
    """Refuse settings whose rounds could not be stacked onto `start`.

    Raises:
        AdaptorError: listing the differences.
    """
    differences = _setting_differences(start.settings, settings)
    if settings.layer not in (None, start.base.layer):
        differences.append(f"layer: {start.base.layer} != {settings.layer}")
    if differences:
        raise AdaptorError("\n  ".join(["the adaptor to continue was made with other settings:", *differences]))


def _state_differences(first: AdaptorState, other: AdaptorState) -> list[str]:
    return first.base.describe_differences(other.base) + _setting_differences(first.settings, other.settings)


def _setting_differences(first: Settings, other: Settings) -> list[str]:
    return [
        f"{name}: {getattr(first, name)} != {getattr(other, name)}"
        for name in _COMPATIBLE_SETTINGS
        if getattr(first, name) != getattr(other, name)
    ]
