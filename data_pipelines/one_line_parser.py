"""The parser of every command: one line says what is wrong, and no argument is guessed or passed over."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NoReturn

USAGE = 2

Advice = Callable[[str, str], str | None]
"""(flag as typed, its value or "") to what is to be written in its place; None where that is not known."""


class OneLineParser(argparse.ArgumentParser):
    """Flags are written out. An unknown one ends the program with 2 and with what was probably meant.

    advice: asked about an unknown flag before the flags that there are.
    """

    advice: Advice | None = None

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Flags and other arguments in any order."""
        # Before argparse misses what a flag that is misspelt should have given.
        self._refuse([word for word in takewhile("--".__ne__, argv) if self._is_unknown_flag(word)], argv)
        # The one for any order takes what stands behind -- for nothing at all.
        read = self.parse_known_args if "--" in argv else self.parse_known_intermixed_args
        known, unknown = read(argv)
        self._refuse(unknown, argv)
        return known

    def _is_unknown_flag(self, word: str) -> bool:
        flag = word.partition("=")[0]
        return flag.startswith("--") and " " not in flag and flag not in self._option_string_actions

    def _refuse(self, unknown: Sequence[str], argv: Sequence[str]) -> None:
        if unknown:
            self.error(f"unknown argument {unknown[0]}; {self._hint(unknown[0], argv)}")

    def _hint(self, word: str, argv: Sequence[str]) -> str:
        flag, equals, value = word.partition("=")
        if not equals:
            value = next(iter(argv[argv.index(word) + 1 :]), "")
        if self.advice is not None and (advice := self.advice(flag, "" if value.startswith("-") else value)):
            return advice
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"did you mean {near[0]}?" if near else f"see {self.prog} --help"

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {self.prog}: {message}\n")
