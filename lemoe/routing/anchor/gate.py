"""The scope gate: all stored anchors, indexed by subject and by the end of their prompts."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lemoe.routing.anchor.comparisons import (
    VECTORISED_FROM,
    ArrayCache,
    Comparisons,
    PairwiseComparisons,
    QuestionTable,
)
from lemoe.routing.anchor.lexicon import Lexicon, infer_subject
from lemoe.routing.anchor.questions import WORDS_BEFORE, Question, StoredQuestion, compare_questions, question_words
from lemoe.routing.anchor.subject_index import SubjectIndex
from lemoe.routing.anchor.subjects import Sentence, Subject
from lemoe.routing.anchor.words import Word, WordReader, split_words

TAIL_TOKENS = 12  # last tokens of a prompt, by which it is looked up


@dataclass(frozen=True, slots=True)
class Anchor:
    """The key of a stored edit: token ids of its prompt and target, and its subject (None: inferred)."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    subject: str | None


class Gate:
    """All stored anchors, with the indices that find them. Later anchors take precedence over earlier ones."""

    def __init__(self, lexicon: Lexicon, *, threshold: float, slack: int):
        """An empty gate.

        Args:
            threshold: conflict up to which another wording is the same question (setting `gate_conflict`).
            slack: tokens that the gate stays open beyond the target's length (setting `gate_slack`).
        """
        self.lexicon = lexicon
        self.threshold = threshold
        self.slack = slack
        self.anchors: list[Anchor] = []
        self.subjects: list[int] = []  # number of each anchor's subject
        self.longest_prompt = 1  # in tokens
        self.index = SubjectIndex(lexicon)
        self._questions: dict[int, StoredQuestion] = {}
        self._tables: dict[int, QuestionTable] = {}
        self._arrays = ArrayCache()
        self._anchors_by_subject: dict[int, list[int]] = defaultdict(list)
        self._by_tail: dict[tuple[int, ...] | bytes, list[int]] = defaultdict(list)
        self._tail_lengths: dict[int, set[int]] = defaultdict(set)  # lengths of the tails that end in a token

    def add(self, anchor: Anchor) -> int:
        """Store an anchor; returns its number. Its question is worked out when a text first mentions its subject."""
        number = len(self.anchors)
        subject = self.index.add(anchor.subject or infer_subject(self.lexicon.decode_text(anchor.prompt), self.lexicon))
        self.anchors.append(anchor)
        self.longest_prompt = max(self.longest_prompt, len(anchor.prompt))
        self.subjects.append(subject)
        self._anchors_by_subject[subject].append(number)
        self._tables.pop(subject, None)
        self._by_tail[self._prompt_tail(anchor.prompt)].append(number)
        if len(anchor.prompt) > 1:
            self._tail_lengths[anchor.prompt[-1]].add(min(TAIL_TOKENS, len(anchor.prompt) - 1))
        return number

    def stored_question(self, number: int) -> StoredQuestion:
        """The question of an anchor."""
        cached = self._questions.get(number)
        if cached is None:
            cached = self._questions[number] = self._build_question(number)
        return cached

    def _build_question(self, number: int) -> StoredQuestion:
        anchor = self.anchors[number]
        words, front = self._question_words(anchor.prompt, self.index.subjects[self.subjects[number]])
        question = Question.from_words(words, self.lexicon)
        front_weight = sum(w for word, w in zip(question.words, question.weights, strict=True) if word in front)
        answer = split_words(self.lexicon.decode_text(anchor.target))
        stems = frozenset(map(self.lexicon.stem, answer)) - frozenset(question.stems)
        return StoredQuestion(question, stems, front_weight / max(question.total_weight, 1e-9))

    def _prompt_tail(self, prompt: tuple[int, ...]) -> tuple[int, ...] | bytes:
        return prompt[1:][-TAIL_TOKENS:] or self.lexicon.token_bytes(prompt[0]).strip()

    def retire(self, number: int) -> None:
        """Remove an anchor from the indices, so that it no longer opens the gate; its number is not used again."""
        self._anchors_by_subject[self.subjects[number]].remove(number)
        self._tables.pop(self.subjects[number], None)
        self._by_tail[self._prompt_tail(self.anchors[number].prompt)].remove(number)

    def compare_anchors(self, subject: int, read: Question) -> Comparisons:
        """The question read about a subject against that of each of its anchors."""
        numbers = self._anchors_by_subject[subject]
        if len(numbers) < VECTORISED_FROM:
            compared = [compare_questions(self.stored_question(number), read, self.lexicon) for number in numbers]
            return PairwiseComparisons(numbers, compared)
        table = self._tables.get(subject)
        if table is None:
            asked = map(self._build_question, numbers)
            table = self._tables[subject] = QuestionTable(numbers, asked, self.lexicon, self._arrays)
        return table.compare(read)

    def find_own_prompt(self, ids: Sequence[int]) -> int:
        """The number of the anchor whose whole prompt ends the tokens `ids`, -1 for none: the longest, then the latest.

        The first token is compared without its leading space, which depends on where a text begins. A prompt without a
        word (`?`) matches only as a whole text or line: otherwise it would match the end of any question.
        """
        candidates = list(self._by_tail.get(self.lexicon.token_bytes(ids[-1]).strip(), ()))
        for length in self._tail_lengths.get(ids[-1], ()):
            candidates += self._by_tail.get(tuple(ids[-length:]), ())
        if not candidates:
            return -1
        return max(
            (number for number in candidates if self._ends_with(ids, self.anchors[number].prompt)),
            key=lambda number: (len(self.anchors[number].prompt), number),
            default=-1,
        )

    def _ends_with(self, ids: Sequence[int], prompt: tuple[int, ...]) -> bool:
        start = len(ids) - len(prompt)
        if start < 0 or tuple(ids[start + 1 :]) != prompt[1:]:
            return False
        if self.lexicon.token_bytes(ids[start]).strip() != self.lexicon.token_bytes(prompt[0]).strip():
            return False
        return self._begins_line(ids, start) or any(self._split_sentences(prompt))

    def _begins_line(self, ids: Sequence[int], start: int) -> bool:
        if start == 0 or self.lexicon.is_special(ids[start - 1]):
            return True
        return self.lexicon.token_bytes(ids[start - 1])[-1:] == b"\n"

    def _question_words(self, prompt: Sequence[int], subject: Subject) -> tuple[list[str], set[str]]:
        """The words of a prompt's question, around its last mention of the subject, and those in front of it."""
        sentences = self._split_sentences(prompt)
        for number in range(len(sentences) - 1, -1, -1):
            sentence = sentences[number]
            mention = subject.find_mention(Sentence(sentence, self.lexicon))
            if mention:
                words = question_words(sentence, mention)
                words += [word.text for later in sentences[number + 1 :] for word in later]
                first = min(mention.positions)
                return words, {word.text for word in sentence[max(0, first - WORDS_BEFORE) : first]}
        last = sentences[-1] if sentences else []
        return [word.text for word in last if word.text not in subject.words], set()

    def _split_sentences(self, prompt: Sequence[int]) -> list[list[Word]]:
        reader = WordReader()
        sentences: list[list[Word]] = []
        for token in prompt:
            if reader.push(self.lexicon.token_bytes(token)) or not sentences:
                sentences.append(reader.words)
            sentences[-1] = reader.words
        return sentences
