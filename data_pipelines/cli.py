"""`clipstack data ...`: finds the subcommand, imports only that one, and turns errors into exit codes and one
line each."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from typing import Protocol, cast

from data_pipelines.errors import ClipstackError, MissingPackageError, SampleError, ShardError, Stopped
from data_pipelines.installing import naming_extra
from data_pipelines.one_line_parser import USAGE, OneLineParser

DONE, FAILED, RESUMABLE = 0, 1, 3

COMMANDS = {
    "build": "make shards from images and captions",
    "index": "index shards, so that training can read any sample of them at once",
    "verify": "check shards; list what is damaged, save what can be saved",
    "stats": "count, measure and show what is in shards",
    "filter": "keep the samples that rules ask for",
    "dedup": "drop samples whose image or caption comes again",
    "reshard": "cut, shuffle, shrink shards anew; apply a removal list",
    "shapes": "make a small procedural data set",
    "order": "show which samples each batch and rank gets",
    "replay": "show what a step of a run saw",
}
"""Name, which is that of a module in `commands`, to one line of help."""


class Command(Protocol):
    """What a subcommand's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


def main(argv: list[str]) -> int:
    """Run `clipstack data ARGV` and return its exit code: 0 done, 1 failed, 2 wrong input, 3 stopped but
    resumable."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return DONE if argv else USAGE
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
        return _fail(f"{name}: no such command; {hint}", USAGE)
    try:
        with naming_extra(name, "data"):
            return _run(name, argv[1:])
    except SystemExit as exit_:  # argparse's, after --help or a wrong argument
        return exit_.code if isinstance(exit_.code, int) else USAGE
    except MissingPackageError as error:
        return _fail(str(error), USAGE)
    except Stopped as error:
        return _fail(f"{name}: {error}", RESUMABLE)
    except (ShardError, SampleError) as error:
        return _fail(f"{name}: {error}", FAILED)
    except ClipstackError as error:
        return _fail(f"{name}: {error}", USAGE)
    except KeyboardInterrupt:
        return _fail(f"{name}: stopped", RESUMABLE)


def _run(name: str, argv: list[str]) -> int:
    help_ = COMMANDS[name]
    command = cast(Command, importlib.import_module(f"data_pipelines.commands.{name}"))
    parser = OneLineParser(f"clipstack data {name}", f"{help_[0].upper()}{help_[1:]}.")
    command.add_arguments(parser)
    return command.run(parser.parse(argv))


def _fail(message: str, code: int) -> int:
    print(f"error: clipstack data {message}", file=sys.stderr)
    return code


def _overview() -> str:
    lines = [f"  {name:<9}{help_}" for name, help_ in COMMANDS.items()]
    return "\n".join(
        ["usage: clipstack data COMMAND ...", "", *lines, "", "clipstack data COMMAND --help says more."]
    )
