"""What the tokens of a sentence add up to, word by word, so that any of its words can be left out."""

from collections.abc import Collection

import numpy

from lemoe.routing.anchor.meaning import Values, Vector


class TokenSums:
    """Weighted sums of the projected tokens `[rank]` of a sentence: of each word, and of all."""

    __slots__ = ("_total", "_weight", "_weights", "_words")

    def __init__(self) -> None:
        self._words: list[Vector] = []
        self._weights: list[float] = []
        self._total: Values | None = None  # in float64, so that words left out leave no trace
        self._weight = 0.0

    def copy(self) -> "TokenSums":
        """Sums of the same tokens, independent of these."""
        other = TokenSums()
        other._words, other._weights = self._words[:], self._weights[:]
        other._total, other._weight = self._total, self._weight
        return other

    def add(self, projected: Vector, weight: float, touched: range) -> None:
        """Count a token for the words `touched` that it adds letters to, in equal parts, or else for the sentence."""
        share = weight / max(len(touched), 1)
        part = projected * numpy.float32(share)
        for word in touched:
            if word < len(self._words):
                self._words[word] = self._words[word] + part
                self._weights[word] += share
            else:
                self._words.append(part)
                self._weights.append(share)
        for _ in touched or (None,):
            self._total = part.astype(numpy.float64) if self._total is None else self._total + part
            self._weight += share

    def without(self, positions: Collection[int]) -> tuple[Vector | None, float]:
        """The sum `[rank]` over the sentence without the words at `positions`, and its weight; None for no token."""
        left_out = [position for position in positions if position < len(self._words)]
        weight = self._weight - sum(self._weights[position] for position in left_out)
        if self._total is None or weight < MIN_WEIGHT:
            return None, 0.0
        total = self._total
        for position in left_out:
            total = total - self._words[position]
        return total.astype(numpy.float32), weight


MIN_WEIGHT = 1e-6  # that no token has, but what rounding may leave of none
