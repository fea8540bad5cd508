"""Guessing by prompt lookup: what followed the last words where they stood before.

The n-grams of a text are kept in tables that grow with it, one for each length: a new token costs
as many look-ups as there are lengths, however long the text is. The longest n-gram that stood
before is taken, and of its places the latest. A guess may run on into itself, so a text that
repeats itself is followed as far as is asked for.

    text    the cat sat on the mat . the cat          n = 2: "the cat" stood at 0
    guess   sat on the mat . the cat sat on ...

Saxena, Prompt Lookup Decoding (2023); in transformers `prompt_lookup_num_tokens`, in vLLM "ngram".
"""

from collections.abc import Sequence as Series

from qtool.runtime.engine.sequence import Sequence


class NgramIndex:
    """The n-grams of one text, for each n from shortest to longest."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        # n-gram -> the position behind its latest occurrence that something follows
        self._behind: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def guess(self, token_ids: Series[int], count: int) -> list[int]:
        """Up to count tokens that may follow; the text only ever grows between calls."""
        for end in range(self._num_indexed + 1, len(token_ids)):
            for length in self._lengths:
                if length <= end:
                    self._behind[tuple(token_ids[end - length : end])] = end
        self._num_indexed = max(len(token_ids) - 1, self._num_indexed)
        for length in self._lengths:
            start = self._behind.get(tuple(token_ids[-length:]))
            if start is not None and length <= len(token_ids):
                return _continue(token_ids, start, count)
        return []


def _continue(token_ids: Series[int], start: int, count: int) -> list[int]:
    guessed = list(token_ids[start : start + count])
    period = len(token_ids) - start
    while len(guessed) < count:
        guessed.append(guessed[len(guessed) - period])
    return guessed


class NgramProposer:
    """Guesses for all sequences of an engine."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._indexes: dict[str, NgramIndex] = {}

    def prepare(self, sequences: Series[Sequence], counts: Series[int]) -> None:
        """Nothing: an index grows as it is asked."""

    def propose(self, sequences: Series[Sequence], counts: Series[int]) -> list[list[int]]:
        return [
            self._index(sequence).guess(sequence.token_ids, count) if count > 0 else []
            for sequence, count in zip(sequences, counts, strict=True)
        ]

    def _index(self, sequence: Sequence) -> NgramIndex:
        index = self._indexes.get(sequence.id)
        if index is None:
            index = self._indexes[sequence.id] = NgramIndex(self._shortest, self._longest)
        return index

    def forget(self, sequence_id: str) -> None:
        self._indexes.pop(sequence_id, None)
