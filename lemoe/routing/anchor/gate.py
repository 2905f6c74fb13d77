"""The scope gate: all stored anchors, and the indices by which a text finds them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lemoe.routing.anchor.comparisons import MANY, ArrayCache, Comparisons, FewComparisons, QuestionTable
from lemoe.routing.anchor.lexicon import Lexicon, infer_subject
from lemoe.routing.anchor.questions import WORDS_BEFORE, Prepared, Question, around, compare
from lemoe.routing.anchor.subject_index import SubjectIndex
from lemoe.routing.anchor.subjects import Sentence, Subject
from lemoe.routing.anchor.words import Reader, Word, split_words

TAIL = 12  # tokens of an anchor by which its own prompt is looked up


@dataclass(frozen=True, slots=True)
class Anchor:
    """What an edit is recognised by: token ids of its prompt and target, and its subject (None: inferred)."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    subject: str | None


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
        self.longest = 1  # tokens of the longest prompt
        self.index = SubjectIndex(lexicon)
        self._prepared: dict[int, Prepared] = {}
        self._tables: dict[int, QuestionTable] = {}
        self._arrays = ArrayCache()
        self._of_subject: dict[int, list[int]] = defaultdict(list)
        self._by_tail: dict[tuple[int, ...] | bytes, list[int]] = defaultdict(list)
        self._endings: dict[int, set[int]] = defaultdict(set)  # lengths of the tails that end in a token

    def add(self, anchor: Anchor) -> int:
        """Store an anchor; returns its number. What it asks is worked out when its subject is first met."""
        number = len(self.anchors)
        subject = self.index.add(anchor.subject or infer_subject(self.lexicon.text(anchor.prompt), self.lexicon))
        self.anchors.append(anchor)
        self.longest = max(self.longest, len(anchor.prompt))
        self.subjects.append(subject)
        self._of_subject[subject].append(number)
        self._tables.pop(subject, None)
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
        self._tables.pop(self.subjects[number], None)
        self._by_tail[self._tail(self.anchors[number].prompt)].remove(number)

    def compare(self, subject: int, read: Question) -> Comparisons:
        """What was read about a subject against what each of its anchors asks."""
        numbers = self._of_subject[subject]
        if len(numbers) < MANY:
            return FewComparisons(numbers, [compare(self.prepared(number), read, self.lexicon) for number in numbers])
        table = self._tables.get(subject)
        if table is None:
            asked = map(self._prepare, numbers)
            table = self._tables[subject] = QuestionTable(numbers, asked, self.lexicon, self._arrays)
        return table.compare(read)

    def own_prompt(self, ids: Sequence[int]) -> int:
        """The anchor whose whole prompt ends here, -1 for none: the longest, then the latest.

        The first token is compared without its leading space, which depends on where a text begins. A prompt without a
        word (`?`) counts only as a whole text or line: else it would be the end of any question.
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
        if self.lexicon.piece(ids[start]).strip() != self.lexicon.piece(prompt[0]).strip():
            return False
        return self._begins_line(ids, start) or any(self._sentences(prompt))

    def _begins_line(self, ids: Sequence[int], start: int) -> bool:
        return start == 0 or self.lexicon.is_special(ids[start - 1]) or self.lexicon.piece(ids[start - 1])[-1:] == b"\n"

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
