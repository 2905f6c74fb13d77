"""The scope gate: all stored anchors, indexed by subject and by the end of their prompts."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy

from lemoe.routing.anchor.comparisons import (
    VECTORISED_FROM,
    ArrayCache,
    Comparisons,
    MeaningComparisons,
    QuestionTable,
    StemTable,
    Values,
    WordComparisons,
    WordTable,
)
from lemoe.routing.anchor.evidence import Decision, Evidence, choose_decision, subject_features
from lemoe.routing.anchor.lexicon import Lexicon, infer_subject
from lemoe.routing.anchor.meaning import Keys, Meaning, Vector
from lemoe.routing.anchor.questions import (
    WORDS_BEFORE,
    Question,
    StoredQuestion,
    compare_questions,
    compare_stems,
    description_positions,
    question_words,
)
from lemoe.routing.anchor.relation_words import RelationProfiles
from lemoe.routing.anchor.subject_index import SubjectIndex
from lemoe.routing.anchor.subjects import Mention, Sentence, Subject
from lemoe.routing.anchor.token_sums import TokenSums
from lemoe.routing.anchor.words import Word, WordReader, split_words

TAIL_TOKENS = 12  # last tokens of a prompt, by which it is looked up


@dataclass(frozen=True, slots=True)
class Anchor:
    """The key of a stored edit: token ids of its prompt and target, and its subject (None: inferred)."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    subject: str | None


@dataclass(frozen=True, slots=True)
class ReadMeaning:
    """What a question means, and which relations of the bank that is like.

    Attributes:
        vector: `[rank]`, see `Meaning.embed`.
        profile: `[relations]`, see `Meaning.profile`.
        relations: `[relations + 1]`, which relation its words mark; see `RelationWords.profile`.
    """

    vector: Vector
    profile: Vector
    relations: Vector


@dataclass(frozen=True, slots=True)
class ReadQuestion:
    """What was read about a subject: words, and what they mean; None where words alone were read."""

    words: Question
    meaning: ReadMeaning | None = None


class SubjectKeys:
    """The keys of all anchors of a subject."""

    __slots__ = ("_keys", "_profiles", "_relations", "_starts")

    def __init__(self, meaning: Meaning, parts: Sequence[Vector], questions: Sequence[Question]):
        """Keys `[keys, rank]` of each anchor, and its question."""
        embedded = numpy.concatenate(parts)
        self._starts = numpy.cumsum([0, *map(len, parts[:-1])])
        self._keys = Keys(meaning, embedded)
        self._profiles = meaning.profile(embedded)
        marked = numpy.stack([meaning.relation_words.profile(question.words) for question in questions])
        self._relations = RelationProfiles(marked)

    def compare(self, read: ReadMeaning) -> MeaningComparisons:
        """What was read against the nearest key of each anchor, and the relation that its words mark."""
        ratios, likeness = self._keys.compare(read.vector), self._profiles @ read.profile
        ratio, alike = (numpy.maximum.reduceat(values, self._starts) for values in (ratios, likeness))
        relation = self._relations.compare(read.relations)
        return MeaningComparisons(ratio.astype(numpy.float64), alike.astype(numpy.float64), relation)


class SubjectQuestions(NamedTuple):
    """The questions of all anchors of a subject: `asked` of few, a `table` of many; and keys if meaning counts."""

    size: int
    asked: Sequence[StoredQuestion]
    table: QuestionTable | None
    keys: SubjectKeys | None


class Gate:
    """All stored anchors, with the indices that find them. Later anchors take precedence over earlier ones."""

    def __init__(
        self,
        lexicon: Lexicon,
        *,
        threshold: float,
        slack: int,
        meaning: Meaning | None = None,
        probability: float = 0.5,
        decision: Decision | None = None,
    ):
        """An empty gate.

        Args:
            threshold: conflict up to which another wording is the same question (setting `gate_conflict`); decides
                where there is no `meaning`.
            slack: tokens that the gate stays open beyond the target's length (setting `gate_slack`).
            meaning: how the base model tells what questions mean.
            probability: from which a text asks for an edit (setting `gate_probability`).
            decision: instead of what these make.
        """
        self.lexicon = lexicon
        self.threshold = threshold
        self.slack = slack
        self.meaning = meaning
        self.decision = decision or choose_decision(meaning, threshold, probability)
        self._embedded: list[Vector] = []  # keys [keys, rank] of each anchor
        self.anchors: list[Anchor] = []
        self.subjects: list[int] = []  # number of each anchor's subject
        self.longest_prompt = 1  # in tokens
        self.index = SubjectIndex(lexicon)
        self._questions: dict[int, StoredQuestion] = {}
        self._by_subject: dict[int, SubjectQuestions] = {}
        self._arrays = ArrayCache()
        self._anchors_by_subject: dict[int, list[int]] = defaultdict(list)
        self._by_tail: dict[tuple[int, ...] | bytes, list[int]] = defaultdict(list)
        self._tail_lengths: dict[int, set[int]] = defaultdict(set)  # lengths of the tails that end in a token

    def add(self, anchor: Anchor, keys: Vector | None = None) -> int:
        """Store an anchor, with its `keys` `[keys, rank]` if meaning counts; returns its number.

        The words of its question are worked out when a text first mentions its subject.
        """
        number = len(self.anchors)
        if keys is not None:
            self._embedded.append(keys)
        subject = self.index.add(anchor.subject or infer_subject(self.lexicon.decode_text(anchor.prompt), self.lexicon))
        self.anchors.append(anchor)
        self.longest_prompt = max(self.longest_prompt, len(anchor.prompt))
        self.subjects.append(subject)
        self._anchors_by_subject[subject].append(number)
        self._by_subject.pop(subject, None)
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
        self._by_subject.pop(self.subjects[number], None)
        self._by_tail[self._prompt_tail(self.anchors[number].prompt)].remove(number)

    def compare_anchors(
        self, subject: int, mention: Mention, read: ReadQuestion, earlier: Values | None
    ) -> Comparisons:
        """The question read about a mention of a subject against that of each of its anchors.

        Args:
            earlier: `[anchors]`, their scores by the sentence before that mentioned the subject.
        """
        stored = self._stored_questions(subject)
        evidence = Evidence(
            subject_features(self.index.subjects[subject], mention),
            self._compare_words(stored, read.words),
            self._compare_meaning(stored, read.meaning),
            earlier,
        )
        numbers = self._anchors_by_subject[subject]
        return Comparisons(numbers, evidence.words, evidence.meaning, *self.decision.judge(evidence))

    def read_meaning(self, words: Sequence[str], total: Vector | None, weight: float) -> ReadMeaning | None:
        """What was read of a question in these words, whose tokens have the weighted sum `total` `[rank]`."""
        if self.meaning is None or total is None:
            return None
        vector = self.meaning.embed(total, weight)
        return ReadMeaning(vector, self.meaning.profile(vector), self.meaning.relation_words.profile(words))

    def _compare_words(self, stored: SubjectQuestions, read: Question) -> WordComparisons:
        if stored.table is not None:
            return stored.table.compare(read)
        if self.meaning is None:
            return WordComparisons.from_pairs([compare_questions(each, read, self.lexicon) for each in stored.asked])
        return WordComparisons.from_pairs([compare_stems(each, read) for each in stored.asked])

    def _compare_meaning(self, stored: SubjectQuestions, read: ReadMeaning | None) -> MeaningComparisons:
        if stored.keys is None or read is None:
            return MeaningComparisons.none(stored.size)
        return stored.keys.compare(read)

    def _stored_questions(self, subject: int) -> SubjectQuestions:
        """The questions of a subject's anchors, worked out when it is first mentioned."""
        found = self._by_subject.get(subject)
        if found is None:
            found = self._by_subject[subject] = self._build_questions(self._anchors_by_subject[subject])
        return found

    def _build_questions(self, numbers: Sequence[int]) -> SubjectQuestions:
        few = len(numbers) < VECTORISED_FROM
        asked = [self.stored_question(number) if few else self._build_question(number) for number in numbers]
        keys, table = None, None
        if self.meaning is not None and numbers:
            questions = [each.question for each in asked]
            keys = SubjectKeys(self.meaning, [self._embedded[number] for number in numbers], questions)
        if not few:
            table = StemTable(asked) if self.meaning else WordTable(asked, self.lexicon, self._arrays)
        return SubjectQuestions(len(numbers), asked if few else (), table, keys)

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

    def longer_prompts(self, number: int) -> list[tuple[int, ...]]:
        """What the prompts of the same subject that begin with an anchor's whole prompt go on with."""
        prompt = self.anchors[number].prompt
        others = (self.anchors[other].prompt for other in self._anchors_by_subject[self.subjects[number]])
        return [other[len(prompt) :] for other in others if len(other) > len(prompt) and self._begins(other, prompt)]

    def _begins(self, ids: Sequence[int], prompt: tuple[int, ...]) -> bool:
        """Whether tokens begin with those of a prompt; the first is compared without its leading space."""
        same = tuple(ids[1 : len(prompt)]) == prompt[1:]
        return same and self.lexicon.token_bytes(ids[0]).strip() == self.lexicon.token_bytes(prompt[0]).strip()

    def _ends_with(self, ids: Sequence[int], prompt: tuple[int, ...]) -> bool:
        start = len(ids) - len(prompt)
        if start < 0 or not self._begins(ids[start:], prompt):
            return False
        return self._begins_line(ids, start) or any(words for words, _ in self._read_sentences(prompt))

    def _begins_line(self, ids: Sequence[int], start: int) -> bool:
        if start == 0 or self.lexicon.is_special(ids[start - 1]):
            return True
        return self.lexicon.token_bytes(ids[start - 1])[-1:] == b"\n"

    def _question_words(self, prompt: Sequence[int], subject: Subject) -> tuple[list[str], set[str]]:
        """The words of a prompt's question, around its last mention of the subject, and those in front of it."""
        sentences = [words for words, _ in self._read_sentences(prompt)]
        found = self._find_last_mention(sentences, subject)
        if found is None:
            return [word.text for word in sentences[-1] if word.text not in subject.words] if sentences else [], set()
        number, mention = found
        words = question_words(sentences[number], mention, self.silent_positions(sentences[number], mention))
        words += [word.text for later in sentences[number + 1 :] for word in later]
        first = min(mention.positions)
        return words, {word.text for word in sentences[number][max(0, first - WORDS_BEFORE) : first]}

    def summarise(self, ids: Sequence[int], projected: Vector, subject: Subject) -> tuple[Vector | None, float]:
        """The weighted sum `[rank]` of what a text asks about a subject, and its weight; see `TokenSums.without`.

        That is the last sentence that mentions the subject, or else the last one; `projected`: `[seq, rank]`.
        """
        sentences = self._read_sentences(ids, projected)
        found = self._find_last_mention([words for words, _ in sentences], subject)
        if found is None:
            return sentences[-1][1].without(())
        words, sums = sentences[found[0]]
        return sums.without(self.silent_positions(words, found[1]))

    def silent_positions(self, words: Sequence[Word], mention: Mention) -> frozenset[int]:
        """Positions of the words that say nothing of what is asked: those of a mention, and where meaning counts, also
        those that describe it.
        """
        if self.meaning is None:
            return mention.positions
        return mention.positions.union(description_positions(words, mention))

    def _find_last_mention(self, sentences: Sequence[list[Word]], subject: Subject) -> tuple[int, Mention] | None:
        """The last of the sentences that mentions a subject, by index, and the mention."""
        for number in reversed(range(len(sentences))):
            if mention := subject.find_mention(Sentence(sentences[number], self.lexicon)):
                return number, mention
        return None

    def _read_sentences(
        self, ids: Sequence[int], projected: Vector | None = None
    ) -> list[tuple[list[Word], TokenSums]]:
        """The words of each sentence of a text, and the sums of its tokens where they are `projected` `[seq, rank]`."""
        reader, sentences = WordReader(), list[tuple[list[Word], TokenSums]]()
        for column, token in enumerate(ids):
            began, touched = reader.push_token(self.lexicon.token_bytes(token))
            if began or not sentences:
                sentences.append((reader.words, TokenSums()))
            if projected is not None and (weight := self.lexicon.token_weight(token)):
                sentences[-1][1].add(projected[column], weight, touched)
        return sentences
