"""The scope gate: which stored edit, if any, is active at each token, read causally.

Two tiers. An edit's own prompt, met token for token, routes to that edit and locks the route for the length of its
target. Otherwise a subject must be mentioned, and what is asked about it in that sentence must not conflict with what
the anchor asks. An open gate stays open for as long as the answer may take, then closes, so that a subject mentioned
far from a question leaves the question alone.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lemoe.anchor.lexicon import Lexicon, infer_subject
from lemoe.anchor.subjects import Mention, Sentence, Subject, SubjectIndex
from lemoe.anchor.words import Reader, Word, split_words
from lemoe.routing import Scope

EVIDENCE = 0.02  # share of what the anchor asks before its subject that must be read before deciding
WORDS_BEFORE = 12  # words in front of a mention that tell what is asked
TAIL = 12  # tokens of an anchor by which its own prompt is looked up


@dataclass(frozen=True, slots=True)
class Anchor:
    """What an edit is recognised by: token ids of its prompt and target, and its subject (None: inferred)."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    subject: str | None


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


SHUT = Reading(-1, "subject", -1, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about a subject: the words around its mention, with their stems, weights and the weights' sum."""

    words: tuple[str, ...]
    stems: tuple[str, ...]
    weights: tuple[float, ...]
    total: float

    @classmethod
    def of(cls, words: Sequence[str], lexicon: Lexicon) -> "Question":
        unique = tuple(dict.fromkeys(words))
        weights = tuple(map(lexicon.relation_weight, unique))
        return cls(unique, tuple(map(lexicon.stem, unique)), weights, sum(weights))


@dataclass(frozen=True, slots=True)
class Prepared:
    """What an anchor asks, the stems of its target, and the share of its question that stands before the subject."""

    question: Question
    answer: frozenset[str]
    front: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """An anchor's question against what was read: see `compare`."""

    conflict: float
    fit: float
    matched: float
    enough: bool


def compare(stored: Prepared, read: Question, lexicon: Lexicon) -> Comparison:
    """How well what was read asks what the anchor asks.

    `conflict` is the weight that both sides hold beyond what they share, the lesser of the two, against what they
    share: a side without content is no conflict. The words of the answer are no evidence, so that reading it changes
    nothing.
    """
    asked, answer = stored.question, stored.answer
    total, total_read = asked.total, read.total
    alike = [list(map(lexicon.likeness(word).__getitem__, read.words)) for word in asked.words]
    best = [max(row, default=0.0) for row in alike]
    best_read = list(map(max, zip(*alike, strict=True))) if alike else [0.0] * len(read.words)
    matched = 0.0
    for weight, likeness in zip(asked.weights, best, strict=True):
        matched += weight * likeness
    matched_read = 0.0
    for stemmed, weight, likeness in zip(read.stems, read.weights, best_read, strict=True):
        if stemmed in answer:
            total_read -= weight
        else:
            matched_read += weight * likeness
    conflict = min(total - matched, total_read - matched_read) / (1 + matched + matched_read)
    fit = (matched + 1) / (total + 1) + (matched_read + 1) / (total_read + 1)
    enough = stored.front < 0.5 or (total_read > 0 and total_read >= EVIDENCE * total * stored.front)
    return Comparison(conflict, fit, matched, enough)


class Gate:
    """All stored anchors, with the indices that find them. Later anchors win over earlier ones."""

    def __init__(self, lexicon: Lexicon, *, threshold: float, slack: int):
        """An empty gate.

        Args:
            threshold: conflict up to which another wording is still the same question.
            slack: tokens that the gate stays open beyond the target's length.
        """
        self.lexicon = lexicon
        self.threshold = threshold
        self.slack = slack
        self.anchors: list[Anchor] = []
        self.subjects: list[int] = []  # number of each anchor's subject
        self.index = SubjectIndex(lexicon)
        self._prepared: dict[int, Prepared] = {}
        self._of_subject: dict[int, list[int]] = defaultdict(list)
        self._by_tail: dict[tuple[int, ...] | bytes, list[int]] = defaultdict(list)
        self._endings: dict[int, set[int]] = defaultdict(set)  # lengths of the tails that end in a token

    def add(self, anchor: Anchor) -> int:
        """Store an anchor; returns its number. What it asks is worked out when its subject is first met."""
        number = len(self.anchors)
        subject = self.index.add(anchor.subject or infer_subject(self.lexicon.text(anchor.prompt), self.lexicon))
        self.anchors.append(anchor)
        self.subjects.append(subject)
        self._of_subject[subject].append(number)
        self._by_tail[self._tail(anchor.prompt)].append(number)
        if len(anchor.prompt) > 1:
            self._endings[anchor.prompt[-1]].add(min(TAIL, len(anchor.prompt) - 1))
        return number

    def prepared(self, number: int) -> Prepared:
        """What an anchor asks."""
        known = self._prepared.get(number)
        if known is None:
            known = self._prepared[number] = self._prepare(number)
        return known

    def _prepare(self, number: int) -> Prepared:
        anchor = self.anchors[number]
        words, front = self._question_words(anchor.prompt, self.index.subjects[self.subjects[number]])
        question = Question.of(words, self.lexicon)
        heavy = sum(w for word, w in zip(question.words, question.weights, strict=True) if word in front)
        answer = split_words(self.lexicon.text(anchor.target))
        stems = frozenset(map(self.lexicon.stem, answer)) - frozenset(question.stems)
        return Prepared(question, stems, heavy / max(question.total, 1e-9))

    def _tail(self, prompt: tuple[int, ...]) -> tuple[int, ...] | bytes:
        return prompt[1:][-TAIL:] or self.lexicon.piece(prompt[0]).strip()

    def retire(self, number: int) -> None:
        """Let an anchor open the gate no more; its number stays taken."""
        self._of_subject[self.subjects[number]].remove(number)
        self._by_tail[self._tail(self.anchors[number].prompt)].remove(number)

    def of_subject(self, subject: int) -> list[int]:
        return self._of_subject[subject]

    def own_prompt(self, ids: Sequence[int]) -> int:
        """The anchor whose whole prompt ends here, -1 for none: the longest, then the latest.

        The first token is compared without its leading space, which depends on where a text begins.
        """
        hits = list(self._by_tail.get(self.lexicon.piece(ids[-1]).strip(), ()))
        for length in self._endings.get(ids[-1], ()):
            hits += self._by_tail.get(tuple(ids[-length:]), ())
        if not hits:
            return -1
        return max(
            (number for number in hits if self._ends_with(ids, self.anchors[number].prompt)),
            key=lambda number: (len(self.anchors[number].prompt), number),
            default=-1,
        )

    def _ends_with(self, ids: Sequence[int], prompt: tuple[int, ...]) -> bool:
        start = len(ids) - len(prompt)
        if start < 0 or tuple(ids[start + 1 :]) != prompt[1:]:
            return False
        return self.lexicon.piece(ids[start]).strip() == self.lexicon.piece(prompt[0]).strip()

    def _question_words(self, prompt: Sequence[int], subject: Subject) -> tuple[list[str], set[str]]:
        """What a prompt asks: around its last mention of the subject, to its end; and which of it stands in front."""
        sentences = self._sentences(prompt)
        for place in range(len(sentences) - 1, -1, -1):
            mention = subject.find(Sentence(sentences[place], self.lexicon))
            if mention:
                words = around(sentences[place], mention)
                words += [word.text for later in sentences[place + 1 :] for word in later]
                first = min(mention.positions)
                return words, {word.text for word in sentences[place][max(0, first - WORDS_BEFORE) : first]}
        last = sentences[-1] if sentences else []
        return [word.text for word in last if word.text not in subject.words], set()

    def _sentences(self, prompt: Sequence[int]) -> list[list[Word]]:
        reader = Reader()
        sentences: list[list[Word]] = []
        for token in prompt:
            if reader.push(self.lexicon.piece(token)) or not sentences:
                sentences.append(reader.words)
            sentences[-1] = reader.words
        return sentences


def around(words: Sequence[Word], mention: Mention) -> list[str]:
    """The words that tell what is asked about a mention: some before it and all behind."""
    start = min(mention.positions) - WORDS_BEFORE
    return [word.text for place, word in enumerate(words) if place not in mention.positions and place >= start]


class Route:
    """The gate's state along one sequence; `push` reads one token."""

    def __init__(self, gate: Gate):
        self._gate = gate
        self._reader = Reader()
        self._ids: list[int] = []
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
        self._matched: dict[int, float] = {}

    def copy(self) -> "Route":
        """The same state, to go on differently from here."""
        other = Route(self._gate)
        other.__dict__.update(self.__dict__)
        other._reader = self._reader.copy()
        other._ids = list(self._ids)
        other._mentions, other._waiting = dict(self._mentions), dict(self._waiting)
        other._matched = dict(self._matched)
        return other

    def push(self, token: int) -> Reading:
        """How the gate stands after `token`."""
        self._ids.append(token)
        time = len(self._ids) - 1
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
        best: tuple[tuple[float, float, int], Reading, bool] | None = None
        nearest: Reading | None = None
        scores: dict[int, float] = {}
        asked: dict[frozenset[int], Question] = {}
        for subject, mention in self._mentions.items():
            read = asked.get(mention.positions)
            if read is None:
                read = asked[mention.positions] = Question.of(around(self._reader.words, mention), self._gate.lexicon)
            for number in self._gate.of_subject(subject):
                compared = compare(self._gate.prepared(number), read, self._gate.lexicon)
                fresh = compared.matched > self._matched.get(number, -1.0) + 1e-6
                self._matched[number] = max(compared.matched, self._matched.get(number, -1.0))
                scores[number] = compared.fit
                inside = compared.enough and compared.conflict <= self._gate.threshold
                reading = Reading(
                    number if inside else -1,
                    "in" if inside else "relation",
                    number,
                    mention.coverage,
                    compared.conflict,
                    compared.fit,
                )
                weight = mention.coverage * self._gate.index.subjects[subject].total
                key = (round(compared.fit, 3), weight, number)
                if inside and (best is None or key > best[0]):
                    best = (key, reading, fresh)
                if nearest is None or compared.conflict < nearest.conflict:
                    nearest = reading
        if self._settling:
            self._settling = False
        elif best is not None:
            self._take(best[0], best[1], best[2], scores, time)
        elif nearest is not None and self._now.edit < 0:
            self._now = nearest

    def _take(
        self, key: tuple[float, float, int], reading: Reading, fresh: bool, scores: dict[int, float], time: int
    ) -> None:
        number, active = reading.edit, self._now.edit
        reach = time + len(self._gate.anchors[number].target) + self._gate.slack
        if number == active:
            self._until = max(self._until, reach) if fresh else self._until
        elif active < 0:
            last = len(self._reader.words) - 1
            if fresh or last in self._mentions[self._gate.subjects[number]].positions:
                self._now, self._until, self._opened = reading, reach, time
        elif fresh and self._beats(key, active, scores):
            self._now, self._until, self._opened = reading, reach, time

    def _beats(self, key: tuple[float, float, int], active: int, scores: dict[int, float]) -> bool:
        """Whether new evidence for another anchor outweighs the active one."""
        score = scores.get(active)
        if score is None or score < key[0]:
            return True
        return score <= key[0] and key[2] > active
