"""The state of the scope gate along one sequence: which edit, if any, is active at each token, from the tokens so far.

`Route.push` reads one token and moves the gate between these states:

1. *Shut* (scope `subject`). The current sentence mentions no stored subject. Each new sentence starts without mentions,
   so that a distracting sentence in front changes nothing.
2. *Subject mentioned* (scope `relation`), still shut. At least `MIN_COVERAGE` of a subject was read, but the question
   around the mention conflicts with each of its anchors by more than `gate_conflict`, or too little of it was read.
3. *Open* (scope `in`). The question conflicts by at most `gate_conflict`; the anchor of the best fit is active, for as
   many tokens as its target has and `gate_slack` more.
4. *Prolonged*. A word that raises the matched weight of the active anchor's question starts that count again.
5. *Switched*. A word that does so for another anchor makes that one active, as in 3, if it fits better, or as well and
   is later, or if the current sentence does not mention the active one's subject.
6. *Locked*. The tokens end in the whole prompt of an edit. From any state, that edit becomes active, and for the length
   of its target nothing is read but a longer prompt that starts no later. The count of `gate_slack` tokens follows,
   as in 3; the target's words count as read, and are no new evidence for 3 to 5. Where the tokens go on as a longer
   prompt does that begins with this one, and not as the target, the gate shuts (1).

From 3 to 6 the gate shuts again (1) when its count is over, so that a subject mentioned far from a question has no
effect on it, and at once if it opened on a word that grew into another one. A sentence break does not shut it.

Where the constants come from: docs/measurements.md measures `gate_conflict` ("The trade-off"), what the gate as a whole
is for ("What each part is for") and the time to route a prompt ("Speed"); docs/capacity.md, what `MIN_COVERAGE` lets
through ("A long run"). For `gate_slack` and the weights in `lexicon`, `questions` and `subjects` no measurement is
recorded.
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lemoe.routing.anchor.comparisons import Comparisons, Values
from lemoe.routing.anchor.gate import Gate, ReadQuestion
from lemoe.routing.anchor.meaning import Vector
from lemoe.routing.anchor.questions import Comparison, Question, question_words
from lemoe.routing.anchor.subjects import MIN_COVERAGE, Mention, Sentence
from lemoe.routing.anchor.token_sums import TokenSums
from lemoe.routing.anchor.words import Word, WordReader
from lemoe.routing.router import Scope


@dataclass(frozen=True, slots=True)
class GateState:
    """The gate's state after a token.

    Attributes:
        edit: number of the active anchor, -1 where the gate is shut.
        scope: `in`; or why the gate is shut: no stored `subject` was mentioned, or another `relation` is asked of one.
        nearest: the anchor that was active or came nearest, -1 if no subject was mentioned.
        coverage: share of its subject's weight that was read.
        conflict: how far the question read differs from its question; the gate opens up to `gate_conflict`.
        fit: matched share of the two questions, 0 to 2.
        meaning: log-likelihood ratio (nats) of both asking the same; 0 where the gate compares words alone.
        score: of all evidence; the gate opens from 0.
    """

    edit: int
    scope: Scope
    nearest: int
    coverage: float
    conflict: float
    fit: float
    meaning: float = 0.0
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """An anchor in scope: its rank, the weight of its mention and its number, and whether there is new evidence."""

    key: tuple[float, float, int]
    mention: Mention
    compared: Comparison
    fresh: bool


# Upper bounds of a route's memory: in all, for each word, mention, partial mention, and, beside its tokens, each longer
# prompt; see `test_route_cache.py`.
ROUTE_BYTES, WORD_BYTES, MENTION_BYTES, PARTIAL_BYTES, LONGER_BYTES = 3072, 160, 640, 160, 64

CONJUNCTIONS = frozenset("and und et y".split())  # at the start of a sentence: the question goes on about its subject
REFERENCES = CONJUNCTIONS | frozenset(
    "he she it they him her them his hers its their theirs er sie es ihr ihre sein seine il elle ils elles son sa ses "
    "leur ella su sus ese esa 彼 她 他 它".split()
)  # words that may stand for a subject of the sentence before

SHUT = GateState(-1, "subject", -1, 0.0, 0.0, 0.0)


class Route:
    """The gate along one sequence; `push` reads one token."""

    def __init__(self, gate: Gate):
        self._gate = gate
        self._reader = WordReader()
        self._time = -1  # index of the last token
        self._ids = array("i")  # the last tokens: at least as many as the longest prompt has
        self._state = SHUT
        self._open_until = -1  # index of the last token for which the gate is open
        self._locked_until = -1  # index of the last token of an own prompt's target
        self._lock_start = 0  # index of that prompt's first token
        self._longer: list[tuple[int, ...]] = []  # what longer prompts that begin with that prompt go on with
        self._discard_evidence = False  # what was read last is a target, no new evidence
        self._opened_at = -1  # index of the token on which the gate opened or switched
        self._word_started_at = -1  # index of the first token of the last word
        self._last_seen: tuple[int, int, bool] | None = (
            None  # words of the sentence, letters of the last, if it may grow
        )
        self._mentions: dict[int, Mention] = {}  # by the subject's number
        self._partial: dict[int, int] = {}  # position of a word of each subject that is not yet mentioned
        self._evidence: dict[int, Values] = {}  # the most for each anchor, by the subject's number
        self._sums = TokenSums()
        self._topics: dict[int, Mention] = {}  # subjects that a pronoun may refer to, as they were mentioned
        self._scores: dict[int, Values] = {}  # of each anchor of a mentioned subject
        self._scores_before: dict[int, Values] = {}  # the same of the topics
        self._opened_word = 0  # index of the first word of the sentence that was read with the gate open

    def copy(self) -> "Route":
        """A route in the same state, independent of this one."""
        other = object.__new__(Route)
        other.__dict__.update(self.__dict__)
        other._reader = self._reader.copy()
        other._ids = self._ids[:]
        other._mentions, other._partial = dict(self._mentions), dict(self._partial)
        other._evidence, other._topics = dict(self._evidence), dict(self._topics)
        other._scores, other._scores_before = dict(self._scores), dict(self._scores_before)
        other._sums = self._sums.copy()
        return other

    @property
    def byte_size(self) -> int:
        """An upper bound of its memory in bytes."""
        arrays = (self._evidence, self._scores, self._scores_before)
        values = sum(len(array) for kept in arrays for array in kept.values())
        rank = self._gate.meaning.rank if self._gate.meaning else 0
        stored = (WORD_BYTES + 4 * rank) * len(self._reader.words)
        stored += MENTION_BYTES * (len(self._mentions) + sum(map(len, arrays)) + len(self._topics))
        stored += sum(LONGER_BYTES + 8 * len(rest) for rest in self._longer)
        return ROUTE_BYTES + stored + 4 * len(self._ids) + PARTIAL_BYTES * len(self._partial) + 16 * values

    def push(self, token: int, projected: Vector | None = None) -> GateState:
        """The gate's state after `token`; `projected`: `[rank]`, what the base model makes of it, if meaning counts."""
        self._ids.append(token)
        if len(self._ids) > 2 * self._gate.longest_prompt:
            del self._ids[: -self._gate.longest_prompt]
        self._time += 1
        time = self._time
        self._read_token(token, projected)
        if self._state.edit >= 0 and time > self._open_until:
            self._shut_gate()
        self._follow_longer_prompts(time)
        if not self._match_own_prompt(time) and time > self._locked_until and self._has_new_letters(time):
            mentions = dict(self._mentions)
            self._update_mentions(time)
            answered = self._answer_positions()
            says_more = len(self._reader.words) - 1 not in answered or mentions != self._mentions
            if says_more or self._discard_evidence:
                self._update_state(time, answered)
        return self._state

    def _read_token(self, token: int, projected: Vector | None) -> None:
        words = self._reader.words
        began, touched = self._reader.push_token(self._gate.lexicon.token_bytes(token))
        if began:
            self._forget_sentence(words)
        if projected is not None and (weight := self._gate.lexicon.token_weight(token)):
            self._sums.add(projected, weight, touched)

    def _forget_sentence(self, words: Sequence[Word]) -> None:
        """Begin another sentence; what this one, of `words`, was about may be referred to by a pronoun."""
        if self._mentions:
            self._topics, self._scores_before = dict(self._mentions), self._scores
        elif any(word.capital and not word.starts_sentence for word in words):
            self._topics, self._scores_before = {}, {}
        self._mentions, self._partial, self._evidence, self._scores = {}, {}, {}, {}
        self._sums = TokenSums()
        self._opened_word = 0
        self._last_seen = None
        if self._state.edit < 0:
            self._state = SHUT

    def _shut_gate(self) -> None:
        self._state = replace(self._state, edit=-1, scope="subject")

    def _match_own_prompt(self, time: int) -> bool:
        """Lock the gate (6) if the tokens end in an edit's whole prompt; returns whether they do."""
        number = self._gate.find_own_prompt(self._ids)
        if number < 0:
            return False
        anchor = self._gate.anchors[number]
        start = time - len(anchor.prompt) + 1
        if time <= self._locked_until and start > self._lock_start:  # a prompt inside the target of another
            return False
        self._state = GateState(number, "in", number, 1.0, 0.0, 2.0)
        self._locked_until = time + len(anchor.target)
        self._lock_start = start
        self._longer = self._gate.longer_prompts(number)
        self._open_until = self._locked_until + self._gate.slack
        self._opened_word = len(self._reader.words)
        self._discard_evidence = True
        return True

    def _follow_longer_prompts(self, time: int) -> None:
        """Shut a locked gate (6) where the tokens go on as a longer prompt does, and not as the target."""
        if not self._longer or time > self._locked_until:
            return
        target, token = self._gate.anchors[self._state.edit].target, self._ids[-1]
        read = time - self._locked_until + len(target) - 1
        self._longer = [rest for rest in self._longer if rest[read : read + 1] == (token,)]
        if self._longer and target[read] != token:
            self._longer, self._locked_until = [], time - 1
            self._shut_gate()

    def _has_new_letters(self, time: int) -> bool:
        """Whether the last token added a word to the sentence or letters to its last word."""
        words = self._reader.words
        seen = (len(words), len(words[-1].text), self._reader.growing) if words else None
        if seen is None or seen == self._last_seen:
            return False
        if self._last_seen is None or self._last_seen[0] != seen[0]:
            self._word_started_at = time
        self._last_seen = seen
        return True

    def _update_mentions(self, time: int) -> None:
        """Check again the mentions that include the growing word, and look for new ones."""
        words, last = self._reader.words, len(self._reader.words) - 1
        sentence = Sentence(words, self._gate.lexicon, growing=self._reader.growing)
        subjects = self._gate.index.subjects
        self._check_mentions(sentence)
        candidates = self._gate.index.find_candidates(words)
        self._complete_partial_mentions(sentence, words[-2:] if time == self._word_started_at else words[-1:])
        for number in candidates:
            found = subjects[number].mention_at_end(sentence)
            if found:
                self._keep_stronger(number, found)
            if len(subjects[number].words) > 1 and (found is None or found.coverage < MIN_COVERAGE):
                self._partial[number] = last
        if words[last].text in REFERENCES and last not in self._answer_positions():
            referred = {number: self._refer_to(number, last) for number in self._topics.keys() - self._mentions.keys()}
            self._mentions |= {number: found for number, found in referred.items() if found}

    def _check_mentions(self, sentence: Sentence) -> None:
        """Look again at the mentions that the last word belongs to, or stands behind without being of the answer."""
        last, subjects = len(sentence.words) - 1, self._gate.index.subjects
        for number, mention in list(self._mentions.items()):
            if last in mention.positions:
                found = subjects[number].mention_at(sentence, last) or subjects[number].find_mention(sentence)
                if found := found or self._refer_to(number, last):
                    self._mentions[number] = found
                else:
                    self._withdraw_mention(number)
            elif not mention.positions.isdisjoint((last - 2, last - 1)) and last not in self._answer_positions():
                self._mentions[number] = subjects[number].look_behind(sentence, mention)

    def _refer_to(self, subject: int, position: int) -> Mention | None:
        """The mention of a topic by the word at `position`, if that refers to it and names nothing else."""
        words = self._reader.words
        topic = self._topics.get(subject)
        if topic is None or self._gate.meaning is None or words[position].text not in REFERENCES:
            return None
        if words[position].text in CONJUNCTIONS and not words[position].starts_sentence:
            return None
        if any(word.capital and not word.starts_sentence for word in words[:position]):
            return None
        return replace(topic, positions=frozenset([position]))

    def _keep_stronger(self, number: int, found: Mention) -> None:
        known = self._mentions.get(number)
        if known is None or found.strength >= known.strength:
            self._mentions[number] = found

    def _complete_partial_mentions(self, sentence: Sentence, fresh: Sequence[Word]) -> None:
        """Look again for subjects of which a part was read, if one of the `fresh` words may belong to the rest.

        Partial mentions at the growing word itself are dropped: the index finds what that word has grown into.
        """
        last = len(sentence.words) - 1
        for number, position in list(self._partial.items()):
            subject = self._gate.index.subjects[number]
            if position == last or last - position > subject.max_gap:
                del self._partial[number]
            elif any(subject.may_contain(word) for word in fresh) and (found := subject.mention_at(sentence, position)):
                self._keep_stronger(number, found)
                if found.coverage >= MIN_COVERAGE:
                    del self._partial[number]

    def _withdraw_mention(self, subject: int) -> None:
        """Drop a mention whose word grew into another one, and shut the gate if it opened on that word."""
        del self._mentions[subject]
        active = self._state.edit
        if active >= 0 and self._gate.subjects[active] == subject and self._opened_at >= self._word_started_at:
            self._shut_gate()

    def _update_state(self, time: int, answered: frozenset[int] = frozenset()) -> None:
        """Compare the anchors of all mentioned subjects: open (3), prolong (4) or switch (5) the gate, or leave it.

        The active anchor shuts its gate where what was read since speaks against it.

        Args:
            answered: positions of the words that are no evidence; see `_answer_positions`.
        """
        candidates: list[Candidate] = []
        nearest: tuple[int, Mention, Comparison] | None = None
        ranks: list[float] = []  # of the active anchor
        scores: list[float] = []
        for subject, mention, found, before in self._compare_mentions(answered):
            if (index := found.index_of(self._state.edit)) is not None:
                ranks.append(float(found.rank[index]))
                scores.append(float(found.score[index]))
            if (index := found.best_index()) is not None:
                candidates.append(self._build_candidate(subject, mention, found, index, before))
            if (index := found.nearest_index()) is not None:
                compared = found.comparison_with(index)
                if nearest is None or compared.score > nearest[2].score:
                    nearest = (found.numbers[index], mention, compared)
        if self._discard_evidence:
            self._discard_evidence = False
            return
        if self._speaks_against_active(scores):
            self._shut_gate()
        if candidates:
            best = max(candidates, key=lambda candidate: candidate.key)
            self._apply_best(best, ranks, time)
        elif nearest is not None and self._state.edit < 0:
            self._state = _build_state(*nearest, in_scope=False)

    def _speaks_against_active(self, scores: Sequence[float]) -> bool:
        """Whether what was read speaks against the active anchor, by its `scores`; there are none where its subject's
        name went on as another one.
        """
        mentioned = self._state.edit >= 0 and self._gate.subjects[self._state.edit] in self._mentions
        return mentioned and max(scores, default=-math.inf) < self._gate.decision.shut_below

    def _build_candidate(
        self, subject: int, mention: Mention, found: Comparisons, index: int, before: Values | None
    ) -> "Candidate":
        weight = mention.coverage * self._gate.index.subjects[subject].total_weight
        key = (round(float(found.rank[index]), 3), weight, found.numbers[index])
        margin = self._gate.decision.margin
        fresh = before is None or before[index] < 0 or found.evidence[index] > before[index] + margin
        return Candidate(key, mention, found.comparison_with(index), bool(fresh))

    def _compare_mentions(self, answered: frozenset[int]) -> Iterator[tuple[int, Mention, Comparisons, Values | None]]:
        """Each mentioned subject: number, mention, the comparisons with its anchors, and the most evidence before."""
        asked: dict[frozenset[int], ReadQuestion] = {}
        for subject, mention in self._mentions.items():
            if not self._gate.decision.admits(self._gate.index.subjects[subject], mention):
                continue
            read = asked.get(mention.positions)
            if read is None:
                read = asked[mention.positions] = self._read_question(mention, answered)
            found = self._gate.compare_anchors(subject, mention, read, self._scores_before.get(subject))
            self._scores[subject] = found.score
            before = self._evidence.get(subject)
            self._evidence[subject] = self._gate.decision.remember(found.evidence, before)
            yield subject, mention, found, before

    def _answer_positions(self) -> frozenset[int]:
        """Positions of the words of the active edit's target that were read since the gate opened.

        The last word may still grow into one of them.
        """
        if self._state.edit < 0 or self._gate.meaning is None:
            return frozenset()
        answer, stem = self._gate.stored_question(self._state.edit).answer_stems, self._gate.lexicon.stem
        words = self._reader.words
        read = {at for at in range(self._opened_word, len(words)) if stem(words[at].text) in answer}
        if self._reader.growing and self._opened_word < len(words):
            beginning = words[-1].text
            if any(stemmed.startswith(beginning) for stemmed in answer):
                read.add(len(words) - 1)
        return frozenset(read)

    def _read_question(self, mention: Mention, answered: frozenset[int]) -> ReadQuestion:
        words = self._reader.words
        silent = self._gate.silent_positions(words, mention) | answered
        question = Question.from_words(question_words(words, mention, silent), self._gate.lexicon)
        return ReadQuestion(question, self._gate.read_meaning(question.words, *self._sums.without(silent)))

    def _apply_best(self, best: "Candidate", active_ranks: Sequence[float], time: int) -> None:
        """Open the gate for the best anchor, prolong it or switch to it."""
        number, active, last = best.key[2], self._state.edit, len(self._reader.words) - 1
        state = _build_state(number, best.mention, best.compared, in_scope=True)
        end = time + len(self._gate.anchors[number].target) + self._gate.slack
        if number == active:
            self._open_until = max(self._open_until, end) if best.fresh else self._open_until
        elif active < 0:
            if best.fresh or last in self._mentions[self._gate.subjects[number]].positions:
                self._state, self._open_until, self._opened_at = state, end, time
                self._opened_word = last + 1
        elif best.fresh and self._outweighs_active(best.key, active, active_ranks):
            self._state, self._open_until, self._opened_at = state, end, time

    def _outweighs_active(self, key: tuple[float, float, int], active: int, ranks: Sequence[float]) -> bool:
        """Whether another anchor ranks higher than the active one, of these `ranks`, or as high and is later."""
        return all(rank < key[0] or (rank <= key[0] and key[2] > active) for rank in ranks)


def _build_state(number: int, mention: Mention, compared: Comparison, *, in_scope: bool) -> GateState:
    return GateState(
        number if in_scope else -1,
        "in" if in_scope else "relation",
        number,
        mention.coverage,
        compared.conflict,
        compared.fit,
        compared.meaning,
        compared.score,
    )
