"""What the tokens of a sentence add up to, word by word, so that any of its words can be left out."""

from collections.abc import Collection

import numpy

from lemoe.routing.anchor.meaning import Vector


class TokenSums:
    """Weighted sums of the projected tokens `[rank]` of a sentence, with the weights' sum in the last place."""

    __slots__ = ("_rest", "_words")

    def __init__(self) -> None:
        self._words: list[Vector] = []
        self._rest: Vector | None = None  # tokens without letters

    def copy(self) -> "TokenSums":
        """Sums of the same tokens, independent of these."""
        other = TokenSums()
        other._words, other._rest = self._words[:], self._rest
        return other

    def add(self, projected: Vector, weight: float, touched: range) -> None:
        """Count a token for the words `touched` that it adds letters to, in equal parts, or else for the sentence."""
        part = numpy.append(projected, numpy.float32(1)) * numpy.float32(weight / max(len(touched), 1))
        if not touched:
            self._rest = part if self._rest is None else self._rest + part
        for word in touched:
            if word < len(self._words):
                self._words[word] = self._words[word] + part
            else:
                self._words.append(part)

    def without(self, positions: Collection[int]) -> tuple[Vector | None, float]:
        """The sum `[rank]` over the sentence without the words at `positions`, and its weight; None for no token."""
        parts = [part for position, part in enumerate(self._words) if position not in positions]
        if self._rest is not None:
            parts.append(self._rest)
        if not parts:
            return None, 0.0
        total: Vector = numpy.sum(parts, axis=0)
        return total[:-1], float(total[-1])
