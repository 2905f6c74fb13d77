"""Baselines `context` and `rag`: nothing is trained; an edit stands in front of the prompt, as a new fact.

`context`: the edit that is asked about, given by whoever measures, which no deployed system knows: an upper bound. It
is IKE (Zheng et al. 2023, arXiv 2305.12740), by default without demonstrations. `rag`: the taught edit whose words are
nearest to the prompt's, by TF-IDF, if it is near enough.

Demonstrations are other taught edits, those nearest to the new fact, each as a new fact and its own prompt with its
answer, the nearest last. IKE's are of three kinds; here all are of its kind `copy`: the other two would take rephrases
and questions about something else, which are what is measured.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit
from lemoe.settings import Settings
from lemoe.training.steps import OnStep


@dataclass(frozen=True)
class Context(ABC):
    """What is put in front of prompts: one of `edits`, all that were taught so far, behind some `demonstrations`."""

    edits: tuple[Edit, ...]
    demonstrations: int

    @property
    def byte_size(self) -> int:
        """Bytes of all that has to be kept: the facts as texts."""
        return sum(len(_state_fact(edit).encode()) for edit in self.edits)

    def complete(self, prompt: str, about: Edit) -> str:
        """The prompt with a new fact in front, or as it is; `about` is the edit that is measured."""
        found = self._find_edit(prompt, about)
        if found is None:
            return prompt
        shown = "".join(f"{_announce(each, _state_fact(each))}\n\n" for each in self._choose_demonstrations(found))
        return shown + _announce(found, prompt)

    @abstractmethod
    def _find_edit(self, prompt: str, about: Edit) -> Edit | None: ...

    def _choose_demonstrations(self, fact: Edit) -> list[Edit]:
        """The edits nearest to `fact`, the nearest last; none that asks the same."""
        if not self.demonstrations:
            return []
        nearest = (self.edits[index] for index in self._compare(_state_fact(fact)).argsort(kind="stable"))
        return [edit for edit in nearest if edit.prompt != fact.prompt][-self.demonstrations :]

    def _compare(self, text: str) -> NDArray[numpy.float64]:
        """Cosines `[edits]` of a text and each fact."""
        vectoriser, facts = self._index
        cosines: NDArray[numpy.float64] = (facts @ vectoriser.transform([text]).T).toarray()[:, 0]
        return cosines

    @cached_property
    def _index(self) -> tuple[TfidfVectorizer, Any]:
        vectoriser = TfidfVectorizer()
        return vectoriser, vectoriser.fit_transform(map(_state_fact, self.edits))


class OwnContext(Context):
    """The edit that is asked about, once it was taught."""

    def _find_edit(self, prompt: str, about: Edit) -> Edit | None:
        return about if about.digest in self._digests else None

    @cached_property
    def _digests(self) -> frozenset[str]:
        return frozenset(edit.digest for edit in self.edits)


@dataclass(frozen=True)
class RetrievedContext(Context):
    """The nearest edit, the latest of equals, from a cosine of `threshold` on."""

    threshold: float

    def _find_edit(self, prompt: str, about: Edit) -> Edit | None:
        cosines = self._compare(prompt)
        best = len(cosines) - 1 - int(cosines[::-1].argmax())
        return self.edits[best] if cosines[best] >= self.threshold else None


def train_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: Context | None, on_step: OnStep
) -> Context:
    """Keep `edits` beside those of `before`."""
    kept = (*(before.edits if before else ()), *edits)
    if settings.method == "context":
        return OwnContext(kept, settings.demonstrations)
    return RetrievedContext(kept, settings.demonstrations, settings.retrieval_threshold)


def _state_fact(edit: Edit) -> str:
    return f"{edit.prompt} {edit.target}"


def _announce(edit: Edit, text: str) -> str:
    return f"New Fact: {_state_fact(edit)}\nPrompt: {text}"
