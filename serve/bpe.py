"""open_clip's SimpleTokenizer with bounds: the same ids, in time n log n a word, and with a cache that cannot
grow.

The original keeps every word it ever saw and takes quadratic time for a word: a stranger's text could fill
the memory or hold the interpreter for seconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Protocol

from serve.errors import ErrorCode, ServeError

CACHED_WORDS = 2**16
CACHED_WORD_LENGTH = 32  # longer ones are rare, and would let few texts push the useful ones out
_END = "</w>"


class WordPattern(Protocol):
    def findall(self, text: str, /) -> list[str]: ...


class SimpleTokenizer(Protocol):
    """What we use of open_clip.tokenizer.SimpleTokenizer."""

    encoder: dict[str, int]
    bpe_ranks: dict[tuple[str, str], int]
    byte_encoder: dict[int, str]
    pat: WordPattern
    sot_token_id: int
    eot_token_id: int
    all_special_ids: list[int]

    def clean_fn(self, text: str) -> str: ...


class BoundedBpe:
    """Text -> token ids without start and end, as `SimpleTokenizer.encode`. Safe to call from any thread."""

    def __init__(self, tokenizer: SimpleTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {
            word for word, token in tokenizer.encoder.items() if token in tokenizer.all_special_ids
        }
        self._ids_of = partial(_ids_of, tokenizer)  # no method: a cache of those would be a cycle, and stay
        self._cached = lru_cache(CACHED_WORDS)(self._ids_of)

    def encode(self, text: str) -> list[int]:
        """Raises ServeError text_special_token: such a token in the middle would end the text there, in
        silence.
        """
        ids: list[int] = []
        for word in self._tokenizer.pat.findall(self._tokenizer.clean_fn(text)):
            if word in self._special:
                message = (
                    f"the text contains {word}, which the model would take for its own marker; remove it"
                )
                raise ServeError(ErrorCode.TEXT_SPECIAL_TOKEN, message)
            ids.extend(self._cached(word) if len(word) <= CACHED_WORD_LENGTH else self._ids_of(word))
        return ids


def _ids_of(tokenizer: SimpleTokenizer, word: str) -> tuple[int, ...]:
    symbols = [tokenizer.byte_encoder[byte] for byte in word.encode("utf-8", "replace")]
    symbols[-1] += _END
    return tuple(tokenizer.encoder[symbol] for symbol in merge(symbols, tokenizer.bpe_ranks))


def merge(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Byte-pair merges of one word, lowest rank first and leftmost among equals, in time n log n.

    Equal to repeating "merge all of the lowest-ranked pair", since a pair that a merge creates always ranks
    higher than the merge itself: it was learnt later. https://arxiv.org/abs/1508.07909, algorithm 1.
    """
    after = [*range(1, len(symbols)), -1]
    before = [*range(-1, len(symbols) - 1)]
    alive: list[str | None] = list(symbols)
    heap: list[tuple[int, int, str, str]] = []

    def consider(left: int) -> None:
        if left >= 0 and after[left] >= 0:
            first, second = alive[left], alive[after[left]]
            assert first is not None and second is not None
            rank = ranks.get((first, second))
            if rank is not None:
                heapq.heappush(heap, (rank, left, first, second))

    for index in range(len(symbols)):
        consider(index)
    while heap:
        _, left, first, second = heapq.heappop(heap)
        right = after[left]
        if right < 0 or alive[left] != first or alive[right] != second:
            continue  # one of the two has been merged since
        alive[left], alive[right] = first + second, None
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        after[right] = -1
        consider(before[left])
        consider(left)
    return [symbol for symbol in alive if symbol is not None]
