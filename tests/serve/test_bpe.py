"""The bounded tokenizer against open_clip's own."""

from __future__ import annotations

import random

import pytest

import clipstack.preprocess  # noqa: F401 - prepares torchvision for open_clip

from open_clip.tokenizer import SimpleTokenizer  # isort: skip

from serve.bpe import CACHED_WORDS, BoundedBpe
from serve.errors import ErrorCode, ServeError

# fmt: off
WORDS = [
    "the", "quick", "antidisestablishmentarianism", "aaaaaaaaaa", "abababab", "東京タワー", "привет", "🚲🌧️",
    "it's", "they'll", "12345", "#$%^&*", "&amp;", "&lt;b&gt;", "naïve", "ﬁne", "\u202eRTL\u202c", "مرحبا",
    "\x00\x07", "<html>",
]
# fmt: on


@pytest.fixture(scope="module")
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def test_ids_are_those_of_open_clip(tokenizer: SimpleTokenizer) -> None:
    bounded, rng = BoundedBpe(tokenizer), random.Random(0)
    for _ in range(400):
        letters = "".join(rng.choice("abcdefghijklmnopqrstuvwxyzé東ß'1 ") for _ in range(rng.randint(1, 60)))
        text = " ".join(rng.choice((letters, *WORDS)) for _ in range(6))
        assert bounded.encode(text) == tokenizer.encode(text), text


def test_special_tokens_inside_a_text_are_refused_since_they_would_end_it(tokenizer: SimpleTokenizer) -> None:
    for text in ("a cat <end_of_text> not this", "<start_of_text>", "x <END_OF_TEXT>"):
        with pytest.raises(ServeError) as caught:
            BoundedBpe(tokenizer).encode(text)
        assert caught.value.code is ErrorCode.TEXT_SPECIAL_TOKEN


def test_the_cache_of_words_is_bounded(tokenizer: SimpleTokenizer) -> None:
    bounded, known = BoundedBpe(tokenizer), len(tokenizer.cache)
    bounded.encode(" ".join(f"w{n}" for n in range(1000)))
    assert len(tokenizer.cache) == known
    assert bounded._cached.cache_info().maxsize == CACHED_WORDS


def test_a_word_of_any_length_takes_few_steps(tokenizer: SimpleTokenizer) -> None:
    """Counted in lookups of pairs rather than in seconds: the original needs some 10^7 for this word."""

    class Counting(dict[tuple[str, str], int]):
        lookups = 0

        def get(self, *args: object) -> object:  # type: ignore[override]
            Counting.lookups += 1
            return super().get(*args)  # type: ignore[arg-type]

    counted = SimpleTokenizer()
    counted.bpe_ranks = Counting(counted.bpe_ranks)
    word = "".join(random.Random(1).choice("abcdefghijklmnopqrstuvwxyz") for _ in range(8192))
    BoundedBpe(counted).encode(word)
    assert Counting.lookups < 4 * len(word)
