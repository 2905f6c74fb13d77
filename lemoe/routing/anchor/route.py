"""How the gate stands along one sequence: which stored edit, if any, is active at each token, read causally.

Two tiers. An edit's own prompt, met token for token, routes to that edit and locks the route for the length of its
target. Otherwise a subject must be mentioned, and what is asked about it in that sentence must not conflict with what
the anchor asks. An open gate stays open for as long as the answer may take, then closes, so that a subject mentioned
far from a question leaves the question alone.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lemoe.routing.anchor.comparisons import Comparisons, Matched
from lemoe.routing.anchor.gate import Gate
from lemoe.routing.anchor.questions import Comparison, Question, around
from lemoe.routing.anchor.subjects import Mention, Sentence
from lemoe.routing.anchor.words import Reader, Word
from lemoe.routing.router import Scope


@dataclass(frozen=True, slots=True)
class Reading:
    """How the gate stands after a token.

    Attributes:
        edit: the active anchor, -1 where the gate is shut.
        scope: `in`; or why it is shut: no stored `subject` was mentioned, or another `relation` is asked of one.
        nearest: the anchor that was active or came nearest, -1 if no subject was mentioned.
        coverage: share of its subject's weight that was read.
        conflict: how far what is asked differs from what it asks; the gate opens up to its threshold.
        fit: how much of what is asked the two share, 0 to 2.
    """

    edit: int
    scope: Scope
    nearest: int
    coverage: float
    conflict: float
    fit: float


ROUTE, WORD, MENTION, WAITING = 3072, 160, 640, 160  # bytes of a route, and for each of what it holds

SHUT = Reading(-1, "subject", -1, 0.0, 0.0, 0.0)


class Route:
    """The gate's state along one sequence; `push` reads one token."""

    def __init__(self, gate: Gate):
        self._gate = gate
        self._reader = Reader()
        self._time = -1  # place of the last token
        self._ids = array("i")  # the last tokens, as many as the longest own prompt has, or some more
        self._now = SHUT
        self._until = -1  # last token for which the gate stays open
        self._locked = -1  # last token for which an own prompt's route is locked
        self._lock_start = 0
        self._settling = False  # the answer to an own prompt was just read; its words are no new evidence
        self._opened = -1
        self._word_start = -1
        self._signature: tuple[int, int] | None = None
        self._mentions: dict[int, Mention] = {}
        self._waiting: dict[int, int] = {}
        self._matched: dict[int, Matched] = {}  # of each subject's anchors

    def copy(self) -> "Route":
        """The same state, to go on differently from here."""
        other = Route(self._gate)
        other.__dict__.update(self.__dict__)
        other._reader = self._reader.copy()
        other._ids = self._ids[:]
        other._mentions, other._waiting = dict(self._mentions), dict(self._waiting)
        other._matched = dict(self._matched)
        return other

    @property
    def size(self) -> int:
        """Bytes that it takes, about, and not less."""
        matched = sum(map(len, self._matched.values()))
        held = WORD * len(self._reader.words) + MENTION * (len(self._mentions) + len(self._matched))
        return ROUTE + held + 4 * len(self._ids) + WAITING * len(self._waiting) + 32 * matched

    def push(self, token: int) -> Reading:
        """How the gate stands after `token`."""
        self._ids.append(token)
        if len(self._ids) > 2 * self._gate.longest:
            del self._ids[: -self._gate.longest]
        self._time += 1
        time = self._time
        if self._reader.push(self._gate.lexicon.piece(token)):
            self._forget_sentence()
        if self._now.edit >= 0 and time > self._until:
            self._shut()
        if not self._own_prompt(time) and time > self._locked and self._read_something(time):
            self._follow_mentions(time)
            self._decide(time)
        return self._now

    def _forget_sentence(self) -> None:
        self._mentions, self._waiting, self._matched = {}, {}, {}
        self._signature = None
        if self._now.edit < 0:
            self._now = SHUT

    def _shut(self) -> None:
        self._now = replace(self._now, edit=-1, scope="subject")

    def _own_prompt(self, time: int) -> bool:
        number = self._gate.own_prompt(self._ids)
        if number < 0:
            return False
        anchor = self._gate.anchors[number]
        start = time - len(anchor.prompt) + 1
        if time <= self._locked and start > self._lock_start:  # a prompt inside the answer of another
            return False
        self._now = Reading(number, "in", number, 1.0, 0.0, 2.0)
        self._locked = time + len(anchor.target)
        self._lock_start = start
        self._until = self._locked + self._gate.slack
        self._settling = True
        return True

    def _read_something(self, time: int) -> bool:
        words = self._reader.words
        signature = (len(words), len(words[-1].text)) if words else None
        if signature is None or signature == self._signature:
            return False
        if self._signature is None or self._signature[0] != signature[0]:
            self._word_start = time
        self._signature = signature
        return True

    def _follow_mentions(self, time: int) -> None:
        """Check again the mentions that the growing word belongs to, and look for new ones."""
        words, last = self._reader.words, len(self._reader.words) - 1
        sentence = Sentence(words, self._gate.lexicon, growing=self._reader.growing)
        subjects = self._gate.index.subjects
        for number in [number for number, mention in self._mentions.items() if last in mention.positions]:
            found = subjects[number].at(sentence, last)
            if found:
                self._mentions[number] = found
            else:
                self._withdraw(number)
        near = self._gate.index.near(words)
        self._complete_waiting(sentence, words[-2:] if time == self._word_start else words[-1:])
        for number in near:
            if number in self._mentions:
                continue
            if found := subjects[number].ending(sentence):
                self._mentions[number] = found
            elif len(subjects[number].words) > 1:
                self._waiting[number] = last

    def _complete_waiting(self, sentence: Sentence, fresh: Sequence[Word]) -> None:
        """Look again at subjects of which a part was read, where one of the `fresh` words may be of the rest.

        Those that waited for the word which has grown are left to the index, which knows what it has grown into.
        """
        last = len(sentence.words) - 1
        for number, at in list(self._waiting.items()):
            subject = self._gate.index.subjects[number]
            if at == last or number in self._mentions or last - at > subject.patience:
                del self._waiting[number]
            elif any(subject.may_hold(word) for word in fresh) and (found := subject.at(sentence, at)):
                self._mentions[number] = found
                del self._waiting[number]

    def _withdraw(self, subject: int) -> None:
        """The word grew into another one; what opened on it was a mistake."""
        del self._mentions[subject]
        active = self._now.edit
        if active >= 0 and self._gate.subjects[active] == subject and self._opened >= self._word_start:
            self._shut()

    def _decide(self, time: int) -> None:
        """Compare all anchors of the mentioned subjects, and open, switch, prolong or stay."""
        best: tuple[tuple[float, float, int], Mention, Comparison, bool] | None = None
        nearest: tuple[int, Mention, Comparison] | None = None
        fits: list[float] = []
        for subject, mention, found, before in self._compared():
            if (fit := found.fit_of(self._now.edit)) is not None:
                fits.append(fit)
            if (place := found.best(self._gate.threshold)) is not None:
                compared = found.at(place)
                weight = mention.coverage * self._gate.index.subjects[subject].total
                key = (round(compared.fit, 3), weight, found.numbers[place])
                if best is None or key > best[0]:
                    best = (key, mention, compared, before is None or compared.matched > before[place] + 1e-6)
            if (place := found.nearest()) is not None:
                compared = found.at(place)
                if nearest is None or compared.conflict < nearest[2].conflict:
                    nearest = (found.numbers[place], mention, compared)
        if self._settling:
            self._settling = False
        elif best is not None:
            key, mention, compared, fresh = best
            self._take(key, _reading(key[2], mention, compared, inside=True), fresh, fits, time)
        elif nearest is not None and self._now.edit < 0:
            self._now = _reading(*nearest, inside=False)

    def _compared(self) -> Iterator[tuple[int, Mention, Comparisons, Matched | None]]:
        """Each mentioned subject with what was read against its anchors, and how much of them was read before."""
        asked: dict[frozenset[int], Question] = {}
        for subject, mention in self._mentions.items():
            read = asked.get(mention.positions)
            if read is None:
                read = asked[mention.positions] = Question.of(around(self._reader.words, mention), self._gate.lexicon)
            found = self._gate.compare(subject, read)
            before = self._matched.get(subject)
            self._matched[subject] = found.most_matched(before)
            yield subject, mention, found, before

    def _take(
        self, key: tuple[float, float, int], reading: Reading, fresh: bool, active_fits: Sequence[float], time: int
    ) -> None:
        number, active = reading.edit, self._now.edit
        reach = time + len(self._gate.anchors[number].target) + self._gate.slack
        if number == active:
            self._until = max(self._until, reach) if fresh else self._until
        elif active < 0:
            last = len(self._reader.words) - 1
            if fresh or last in self._mentions[self._gate.subjects[number]].positions:
                self._now, self._until, self._opened = reading, reach, time
        elif fresh and self._beats(key, active, active_fits):
            self._now, self._until, self._opened = reading, reach, time

    def _beats(self, key: tuple[float, float, int], active: int, fits: Sequence[float]) -> bool:
        """Whether new evidence for another anchor outweighs the active one, which `fits` so well where mentioned."""
        return all(fit < key[0] or (fit <= key[0] and key[2] > active) for fit in fits)


def _reading(number: int, mention: Mention, compared: Comparison, *, inside: bool) -> Reading:
    return Reading(
        number if inside else -1,
        "in" if inside else "relation",
        number,
        mention.coverage,
        compared.conflict,
        compared.fit,
    )
