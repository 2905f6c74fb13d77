"""Weights and similarities of words, from the tokenizer and the input embeddings alone.

Nothing here depends on which edits are stored, so that adding edits does not change the routes of earlier ones.
"""

import math
import re
from collections.abc import Sequence
from functools import cached_property

import numpy
from numpy.typing import NDArray

from lemoe.base.placement import own_weights
from lemoe.base.token_bytes import token_bytes_reader
from lemoe.routing.anchor.meaning import token_weight
from lemoe.routing.anchor.words import fold_text, stem_word
from lemoe.routing.router import Host

RELATION_UNIT = 1.6  # rarity of a word whose relation weight is 1
COSINE_FLOOR = 0.15  # cosine below which two words are unrelated
CACHED_PAIRS = 1 << 20  # similarities of two words that are kept
CHUNK_ROWS = 4096  # rows of the embedding matrix that are changed at a time
RELATION_POWER = 4.0  # steep, so that "the name of" does not outweigh "mother"

Vector = NDArray[numpy.float32]


class Lexicon:
    """Cached look-ups of tokens and words for one base model."""

    def __init__(self, base: Host):
        self._tokenizer = base.tokenizer
        self._special = frozenset(base.tokenizer.all_special_ids)
        self._decode_piece = token_bytes_reader(base.tokenizer)
        self._embedding = base.embedding
        self._ids: dict[str, list[int]] = {}
        self._rarity: dict[str, float] = {}
        self._known: dict[str, float] = {}
        self._is_name: dict[str, bool] = {}
        self._relation: dict[str, float] = {}
        self._vector: dict[str, Vector] = {}
        self._similarities: dict[str, WordSimilarities] = {}
        self._compared = 0  # similarities worked out since the cache was last emptied
        self._token_bytes: dict[int, bytes] = {}
        self._token_weights: dict[int, float] = {}

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of a run of tokens, without special tokens, whose names are not words of the text."""
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded

    def is_special(self, token: int) -> bool:
        """Whether a token is one of the tokenizer's special ones, which are not part of the text."""
        return token in self._special

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; a special token gives a space."""
        if token not in self._token_bytes:
            self._token_bytes[token] = self._compute_bytes(token)
        return self._token_bytes[token]

    def _compute_bytes(self, token: int) -> bytes:
        text = None if token in self._special else self._tokenizer.convert_ids_to_tokens(token)
        return b" " if text is None else self._decode_piece(text)

    def token_weight(self, token: int) -> float:
        """The weight of a token in what a question means; none for special tokens and space."""
        weight = self._token_weights.get(token)
        if weight is None:
            weight = self._token_weights[token] = token_weight(token) if self.token_bytes(token).strip() else 0.0
        return weight

    @staticmethod
    def stem(word: str) -> str:
        return stem_word(word)

    def rarity(self, word: str) -> float:
        """`log(1 + id / 200)` of the rarest token (ids grow with rarity), plus 1 for each further token."""
        if word not in self._rarity:
            ids = self._token_ids(word)
            self._rarity[word] = max(math.log1p(token / 200) for token in ids) + len(ids) - 1 if ids else 0.0
        return self._rarity[word]

    def known_rarity(self, word: str) -> float:
        """`log(1 + id / 200)` of a word that is one token, capitalised or not; infinite for one that is not."""
        if word not in self._known:
            forms = (self._token_ids(word), self._token_ids(word.capitalize()))
            self._known[word] = min((math.log1p(ids[0] / 200) for ids in forms if len(ids) == 1), default=math.inf)
        return self._known[word]

    def is_name(self, word: str) -> bool:
        """Whether a word is more frequent with a capital: one token then, and of a lower id than without."""
        if word not in self._is_name:
            capitalised, plain = self._token_ids(word.capitalize()), self._token_ids(word)
            self._is_name[word] = len(capitalised) == 1 and (len(plain) != 1 or capitalised[0] < plain[0])
        return self._is_name[word]

    def relation_weight(self, word: str) -> float:
        """Weight of a word in the question about a subject: `(rarity / RELATION_UNIT) ** RELATION_POWER`."""
        if word not in self._relation:
            self._relation[word] = (self.rarity(word) / RELATION_UNIT) ** RELATION_POWER
        return self._relation[word]

    def similarities_to(self, word: str) -> "WordSimilarities":
        """The similarities of other words to this one, worked out on access."""
        if self._compared >= CACHED_PAIRS:
            self._similarities.clear()
            self._compared = 0
        cached = self._similarities.get(word)
        if cached is None:
            cached = self._similarities[word] = WordSimilarities(self, word)
        return cached

    def word_similarity(self, word: str, other: str) -> float:
        """Similarity of two words, 0 to 1: their cosine above `COSINE_FLOOR`, rescaled; 1 where they share a stem."""
        self._compared += 1
        if self.stem(word) == self.stem(other):
            return 1.0
        cosine = float(self.word_vector(word) @ self.word_vector(other))
        return min(max((cosine - COSINE_FLOOR) / (1 - COSINE_FLOOR), 0.0), 1.0)

    def vector_similarities(self, word: str, vectors: Vector) -> NDArray[numpy.float64]:
        """`word_similarity` with the words of these vectors `[words, hidden]`, none of which shares its stem.

        Each is a dot product of its own, so that the numbers are those of `word_similarity`, bit for bit.
        """
        cosines = (vectors[:, None, :] @ self.word_vector(word)[:, None])[:, 0, 0].astype(numpy.float64)
        return numpy.clip((cosines - COSINE_FLOOR) / (1 - COSINE_FLOOR), 0.0, 1.0)

    def word_vector(self, word: str) -> Vector:
        """Unit vector `[hidden]`: the mean of the word's token embeddings without their common direction."""
        if word not in self._vector:
            ids = self._token_ids(word)
            mean = self._vectors[ids].mean(0) if ids else numpy.zeros(self._vectors.shape[1], numpy.float32)
            self._vector[word] = mean / (numpy.linalg.norm(mean) + 1e-9)
        return self._vector[word]

    @cached_property
    def _vectors(self) -> Vector:
        """The embedding `[tokens, hidden]` of each token without their common direction; not read by meaning."""
        return _remove_common_direction(own_weights(self._embedding)["weight"].detach().float().cpu().numpy())

    def _token_ids(self, word: str) -> list[int]:
        if word not in self._ids:
            self._ids[word] = self._tokenizer(" " + word, add_special_tokens=False).input_ids
        return self._ids[word]


class WordSimilarities(dict[str, float]):
    """Similarities of other words to one word, each worked out on first access."""

    def __init__(self, lexicon: Lexicon, word: str):
        super().__init__()
        self._lexicon = lexicon
        self._word = word

    def __missing__(self, other: str) -> float:
        similarity = self[other] = self._lexicon.word_similarity(self._word, other)
        return similarity


def _remove_common_direction(embeddings: Vector) -> Vector:
    """Embeddings `[tokens, hidden]`, centred, without their first principal direction; in place, in chunks."""
    centred = embeddings - embeddings.mean(0)
    common = numpy.linalg.eigh(centred.T @ centred)[1][:, -1]
    along = centred @ common
    for first in range(0, len(centred), CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        centred[rows] -= numpy.outer(along[rows], common)
    return centred


LINK_WORDS = frozenset("of the de von van der la le du da di del and in al bin dos y for on to a".split())
_OPENING_WORDS = frozenset(
    "what which who whom whose when where how why in on the at by is was of to from a an for did does during".split()
)
_MIN_NAME_RARITY = 3.0  # summed rarity below which a run of capitalised words is not a name
_WRITTEN_WORD = re.compile(r"[^\W_]+(?:[.'’\-&][^\W_]+)*\.?")


def infer_subject(text: str, lexicon: Lexicon) -> str:
    """The subject of a prompt that names none: its rarest run of capitalised words, or else the whole prompt."""
    runs = _find_capitalised_runs(text)
    rarity = {run: sum(lexicon.rarity(fold_text(word.rstrip("."))) for word in run[2]) for run in runs}
    best = max(runs, key=lambda run: rarity[run], default=None)
    if best is None or rarity[best] < _MIN_NAME_RARITY:
        return text.strip()
    return _written_run(text, best)


def guess_subject(text: str) -> str:
    """The same where there is no base model to tell what is rare: the run with the most letters."""
    best = max(_find_capitalised_runs(text), key=lambda run: sum(map(len, run[2])), default=None)
    return text.strip() if best is None else _written_run(text, best)


CapitalisedRun = tuple[int, int, tuple[str, ...]]  # start and end in the text, and its capitalised words


def _written_run(text: str, run: CapitalisedRun) -> str:
    """A run as the text writes it, without a possessive ending."""
    return re.sub(r"['’]s?$", "", text[run[0] : run[1]].rstrip("."))


def _find_capitalised_runs(text: str) -> list[CapitalisedRun]:
    """Runs of capitalised or numeric words, with up to two link words in a row between them."""
    runs: list[CapitalisedRun] = []
    current: list[tuple[int, int, str | None]] = []  # start, end, the word or None for a link

    def close_run() -> None:
        while current and current[-1][2] is None:
            current.pop()
        if current:
            runs.append((current[0][0], current[-1][1], tuple(word for *_, word in current if word)))
        current.clear()

    end = 0
    for number, found in enumerate(_WRITTEN_WORD.finditer(text)):
        gap, end, word = text[end : found.start()], found.end(), found.group()
        core = word.rstrip(".")
        capital = core[:1].isdigit() or any(char.isupper() for char in core)
        if any(char in '?!;:\n"' for char in gap) or ("," in gap and not capital):
            close_run()
        opens = number == 0 or any(char in ".?!\n" for char in gap)
        if capital and not (opens and core.lower() in _OPENING_WORDS):
            current.append((found.start(), end, word))
        elif current and core.lower() in LINK_WORDS and sum(word is None for *_, word in current[-2:]) < 2:
            current.append((found.start(), end, None))
        else:
            close_run()
        if word.endswith(".") and len(core) > 3:
            close_run()
    close_run()
    return runs
