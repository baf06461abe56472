"""Rules that samples have to meet, each an SQL condition on the table's columns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from data_pipelines.errors import DataError

PRESETS: Mapping[str, tuple[str, ...]] = {
    # https://arxiv.org/abs/2304.14108, basic filtering; sizes are those before any shrinking
    "datacomp-basic": (
        "language = 'en'",
        "caption_words > 2",
        "caption_chars > 5",
        "least(original_width, original_height) >= 200",
        "greatest(original_width, original_height) <= 3 * least(original_width, original_height)",
    ),
}

UNSURE = 0.5
"""Below this probability the language of a caption counts as unknown."""


@dataclass(frozen=True)
class RuleCount:
    rule: str
    passed: int
    """Samples that meet this rule, whatever the others say."""
    only_this_dropped: int
    """Samples that every other rule would have kept."""


@dataclass(frozen=True)
class Selection:
    places: tuple[int, ...]
    """Of the kept samples, in order."""
    samples: int
    counts: tuple[RuleCount, ...]


def select(frame: pl.DataFrame, rules: Sequence[str]) -> Selection:
    """Samples that meet all rules; where a value is unknown, a rule that needs it is not met. Raises
    DataError."""
    verdicts = frame.select(
        **{str(i): rule_expression(rule, frame).fill_null(False) for i, rule in enumerate(rules)}
    )
    kept = pl.fold(pl.lit(True), lambda a, b: a & b, [pl.col(name) for name in verdicts.columns])
    missed = pl.sum_horizontal((~pl.col(name)).cast(pl.Int32) for name in verdicts.columns)
    only = verdicts.select(*((~pl.col(name) & (missed == 1)).sum().alias(name) for name in verdicts.columns))
    mask = verdicts.select(kept.alias("kept"))["kept"]
    return Selection(
        places=tuple(frame.filter(mask)["place"].to_list()),
        samples=frame.height,
        counts=tuple(
            RuleCount(rule, int(verdicts[str(i)].sum()), int(only[str(i)][0])) for i, rule in enumerate(rules)
        ),
    )


def rule_expression(rule: str, frame: pl.DataFrame) -> pl.Expr:
    """An SQL condition as a polars expression, tried on an empty table. Raises DataError."""
    try:
        expression = pl.sql_expr(rule)
        result = frame.head(0).select(expression.alias("rule"))["rule"]
    except pl.exceptions.ColumnNotFoundError as error:
        raise DataError(f"rule {rule!r}: {_unknown_column(str(error), frame)}") from error
    except pl.exceptions.PolarsError as error:
        raise DataError(f"rule {rule!r}: {str(error).splitlines()[0]}") from error
    if result.dtype != pl.Boolean:
        raise DataError(f"rule {rule!r}: is no condition; compare something, as in `width >= 200`")
    return expression


def _unknown_column(message: str, frame: pl.DataFrame) -> str:
    name = message.split('"')[1] if message.count('"') >= 2 else message.split(";")[0].split("\n")[0]
    near = difflib.get_close_matches(name, frame.columns, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(frame.columns)}"
    return f"no column {name!r}; {hint}"


def with_language(frame: pl.DataFrame) -> pl.DataFrame:
    """Fills in the language of captions (ISO 639-1) where no table knows it; what stays unclear is `und`.

    py3langid's model, which is fast and small; on captions of a few words it is often unsure.
    """
    from py3langid.langid import (  # type: ignore[import-untyped, unused-ignore]
        MODEL_FILE,
        LanguageIdentifier,
    )

    identifier = LanguageIdentifier.from_pickled_model(MODEL_FILE, norm_probs=True)

    def identify(caption: str) -> str:
        language, probability = identifier.classify(caption)
        return str(language) if probability >= UNSURE else "und"

    found = pl.col("caption").map_elements(identify, return_dtype=pl.String)
    return frame.with_columns(language=pl.coalesce("language", found))
