"""What a word weighs and means, from the tokenizer and the input embeddings alone.

Nothing here depends on which edits are stored: that is what keeps an edit's route where it is when others arrive.
"""

import math
import re
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from lemoe.base.placement import own_weights
from lemoe.base.token_bytes import piece_reader
from lemoe.routing.anchor.words import fold, stem
from lemoe.routing.router import Host

RELATION_UNIT = 1.6
FLOOR = 0.15  # cosine below which two words are unrelated
REMEMBERED = 1 << 20  # pairs of words
ROWS = 4096  # of embeddings, worked on at a time
RELATION_POWER = 4.0  # steep, so that "the name of" does not outweigh "mother"

Vector = NDArray[numpy.float32]


class Lexicon:
    """Cached look-ups for one base model."""

    def __init__(self, base: Host):
        self._tokenizer = base.tokenizer
        self._special = frozenset(base.tokenizer.all_special_ids)
        self._read = piece_reader(base.tokenizer)
        self._vectors = _without_common_direction(own_weights(base.embedding)["weight"].detach().float().cpu().numpy())
        self._ids: dict[str, list[int]] = {}
        self._rarity: dict[str, float] = {}
        self._relation: dict[str, float] = {}
        self._vector: dict[str, Vector] = {}
        self._likeness: dict[str, Likeness] = {}
        self._compared = 0
        self._piece: dict[int, bytes] = {}
        self._stem: dict[str, str] = {}

    def text(self, ids: Sequence[int]) -> str:
        """The text of a run of tokens, without special ones, whose names are no words."""
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded

    def is_special(self, token: int) -> bool:
        """Whether a token marks a place in the text, as its beginning, and is none of it."""
        return token in self._special

    def piece(self, token: int) -> bytes:
        """The bytes of a token; a special token reads as a space."""
        if token not in self._piece:
            self._piece[token] = self._read_piece(token)
        return self._piece[token]

    def _read_piece(self, token: int) -> bytes:
        text = None if token in self._special else self._tokenizer.convert_ids_to_tokens(token)
        return b" " if text is None else self._read(text)

    def stem(self, word: str) -> str:
        if word not in self._stem:
            self._stem[word] = stem(word)
        return self._stem[word]

    def rarity(self, word: str) -> float:
        """`log(1 + id / 200)` of the rarest token (ids grow with rarity), plus one for each further token."""
        if word not in self._rarity:
            ids = self._tokens(word)
            self._rarity[word] = max(math.log1p(token / 200) for token in ids) + len(ids) - 1 if ids else 0.0
        return self._rarity[word]

    def relation_weight(self, word: str) -> float:
        """How much a word tells of what is asked about a subject."""
        if word not in self._relation:
            self._relation[word] = (self.rarity(word) / RELATION_UNIT) ** RELATION_POWER
        return self._relation[word]

    def likeness(self, word: str) -> "Likeness":
        """How far other words mean the same as this one."""
        if self._compared >= REMEMBERED:
            self._likeness.clear()
            self._compared = 0
        known = self._likeness.get(word)
        if known is None:
            known = self._likeness[word] = Likeness(self, word)
        return known

    def compare(self, word: str, other: str) -> float:
        """How far two words mean the same, 0 to 1; 1 with a common stem."""
        self._compared += 1
        if self.stem(word) == self.stem(other):
            return 1.0
        cosine = float(self.vector(word) @ self.vector(other))
        return min(max((cosine - FLOOR) / (1 - FLOOR), 0.0), 1.0)

    def compare_all(self, word: str, vectors: Vector) -> NDArray[numpy.float64]:
        """`compare` with the words of these vectors `[words, hidden]`, none of which has the same stem.

        Each is a dot product of its own, so that the numbers are those of `compare`, bit for bit.
        """
        cosines = (vectors[:, None, :] @ self.vector(word)[:, None])[:, 0, 0].astype(numpy.float64)
        return numpy.clip((cosines - FLOOR) / (1 - FLOOR), 0.0, 1.0)

    def vector(self, word: str) -> Vector:
        """Unit vector `[hidden]`: the mean of the word's token embeddings without their common direction."""
        if word not in self._vector:
            ids = self._tokens(word)
            mean = self._vectors[ids].mean(0) if ids else numpy.zeros(self._vectors.shape[1], numpy.float32)
            self._vector[word] = mean / (numpy.linalg.norm(mean) + 1e-9)
        return self._vector[word]

    def _tokens(self, word: str) -> list[int]:
        if word not in self._ids:
            self._ids[word] = self._tokenizer(" " + word, add_special_tokens=False).input_ids
        return self._ids[word]


class Likeness(dict[str, float]):
    """How far each other word means the same as one, worked out when it is first asked for."""

    def __init__(self, lexicon: Lexicon, word: str):
        super().__init__()
        self._lexicon = lexicon
        self._word = word

    def __missing__(self, other: str) -> float:
        known = self[other] = self._lexicon.compare(self._word, other)
        return known


def _without_common_direction(embeddings: Vector) -> Vector:
    """`[words, hidden]`, centred, without their first principal direction; made in place, a few rows at a time."""
    centred = embeddings - embeddings.mean(0)
    common = numpy.linalg.eigh(centred.T @ centred)[1][:, -1]
    along = centred @ common
    for first in range(0, len(centred), ROWS):
        rows = slice(first, first + ROWS)
        centred[rows] -= numpy.outer(along[rows], common)
    return centred


_LINKS = frozenset("of the de von van der la le du da di del and in al bin dos y for on to a".split())
_OPENERS = frozenset(
    "what which who whom whose when where how why in on the at by is was of to from a an for did does during".split()
)
_NAME_RARITY = 3.0  # a run of capitalised words lighter than this is no name
_WRITTEN_WORD = re.compile(r"[^\W_]+(?:[.'’\-&][^\W_]+)*\.?")


def infer_subject(text: str, lexicon: Lexicon) -> str:
    """The subject of a prompt that names none: its heaviest run of capitalised words, or else the whole prompt."""
    runs = _capitalised_runs(text)
    weigh = {run: sum(lexicon.rarity(fold(word.rstrip("."))) for word in run[2]) for run in runs}
    best = max(runs, key=lambda run: weigh[run], default=None)
    if best is None or weigh[best] < _NAME_RARITY:
        return text.strip()
    return re.sub(r"['’]s?$", "", text[best[0] : best[1]].rstrip("."))


Run = tuple[int, int, tuple[str, ...]]  # start, end, its capitalised words


def _capitalised_runs(text: str) -> list[Run]:
    """Runs of capitalised or numeric words, link words inside allowed."""
    runs: list[Run] = []
    current: list[tuple[int, int, str | None]] = []  # start, end, the word or None for a link

    def close() -> None:
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
            close()
        opens = number == 0 or any(char in ".?!\n" for char in gap)
        if capital and not (opens and core.lower() in _OPENERS):
            current.append((found.start(), end, word))
        elif current and core.lower() in _LINKS and sum(word is None for *_, word in current[-2:]) < 2:
            current.append((found.start(), end, None))
        else:
            close()
        if word.endswith(".") and len(core) > 3:
            close()
    close()
    return runs
