"""Baselines `context` and `rag`: nothing is trained; an edit stands in front of the prompt, as a new fact.

`context`: the edit that is asked about, given by whoever measures, which no deployed system knows: an upper bound. It
is IKE (Zheng et al. 2023, arXiv 2305.12740) without demonstrations. `rag`: the taught edit whose words are nearest to
the prompt's, by TF-IDF, if it is near enough.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer

from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit
from lemoe.settings import Settings
from lemoe.training.steps import OnStep


@dataclass(frozen=True)
class Context(ABC):
    """What is put in front of prompts: one of `edits`, all that were taught so far."""

    edits: tuple[Edit, ...]

    @property
    def byte_size(self) -> int:
        """Bytes of all that has to be kept: the facts as texts."""
        return sum(len(_state_fact(edit).encode()) for edit in self.edits)

    def complete(self, prompt: str, about: Edit) -> str:
        """The prompt with a new fact in front, or as it is; `about` is the edit that is measured."""
        found = self._find_edit(prompt, about)
        return prompt if found is None else f"New Fact: {_state_fact(found)}\nPrompt: {prompt}"

    @abstractmethod
    def _find_edit(self, prompt: str, about: Edit) -> Edit | None: ...


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
        vectoriser, facts = self._index
        cosines = (facts @ vectoriser.transform([prompt]).T).toarray()[:, 0]
        best = len(cosines) - 1 - int(cosines[::-1].argmax())
        return self.edits[best] if cosines[best] >= self.threshold else None

    @cached_property
    def _index(self) -> tuple[TfidfVectorizer, Any]:
        vectoriser = TfidfVectorizer()
        return vectoriser, vectoriser.fit_transform(map(_state_fact, self.edits))


def train_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: Context | None, on_step: OnStep
) -> Context:
    """Keep `edits` beside those of `before`."""
    kept = (*(before.edits if before else ()), *edits)
    return OwnContext(kept) if settings.method == "context" else RetrievedContext(kept, settings.retrieval_threshold)


def _state_fact(edit: Edit) -> str:
    return f"{edit.prompt} {edit.target}"
