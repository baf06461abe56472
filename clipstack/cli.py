"""The `clipstack` command: finds the subcommand and hands over. Nothing heavy is imported before it is
known."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from clipstack import __version__
from clipstack.errors import ClipstackError, ConfigError, DataError, MissingPackageError, Stopped
from data_pipelines.installing import naming_extra
from data_pipelines.one_line_parser import USAGE, OneLineParser


@dataclass(frozen=True)
class Command:
    """A subcommand: `module` has either main(argv) -> int, or add_arguments(parser) and run(args) -> int.

    extra: of pyproject.toml, what run needs beyond the base install; main sees to that itself.
    """

    module: str
    help: str
    extra: str = ""
    parses_itself: bool = False


COMMANDS = {
    "demo": Command(
        "clipstack.demo.command",
        "make a small data set, train, evaluate and report, on a laptop CPU",
        "train",
    ),
    "train": Command(
        "clipstack.train", "train from a recipe (one process, or under torchrun)", parses_itself=True
    ),
    "eval": Command("clipstack.evaluate", "zero-shot classification and retrieval of any model", "eval"),
    "export": Command("clipstack.export", "write a run's model as a folder that open_clip loads", "model"),
    "embed": Command("clipstack.embed", "bulk embeddings of shards", "eval,data"),
    "serve": Command("serve.cli", "serve a model over REST", "serve"),
    "compare": Command("clipstack.compare", "two evaluations side by side, with significance"),
    "runs": Command("clipstack.runs", "table and curves of runs"),
    "data": Command(
        "data_pipelines.cli", "build, index, verify, filter and look into shards", parses_itself=True
    ),
    "doctor": Command("clipstack.doctor", "what works on this machine, and how to get what does not"),
}


READER_GONE = 141
"""What shells report of a program that SIGPIPE ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0 done, 1 failed, 2 wrong input, 3 stopped but resumable, 141
    ended because nobody reads its output any more, as in `| head`."""
    try:
        code = _main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What is still buffered can go nowhere, not even when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def _main(argv: Sequence[str] | None) -> int:
    # The deepspeed launcher puts --local_rank in front of everything.
    argv = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank=")]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"clipstack {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"error: clipstack {name}: no such command; {hint}", file=sys.stderr)
        return USAGE
    return _run(name, COMMANDS[name], rest)


def _run(name: str, command: Command, argv: list[str]) -> int:
    module = importlib.import_module(command.module)
    if command.parses_itself:
        return int(module.main(argv))
    parser = OneLineParser(f"clipstack {name}", f"{command.help[0].upper()}{command.help[1:]}.")
    module.add_arguments(parser)
    args = parser.parse(argv)
    try:
        with naming_extra(f"clipstack {name}", command.extra):
            return int(module.run(args))
    except ClipstackError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 3


def exit_code(error: ClipstackError) -> int:
    """What a command that ended with this error returns to the shell."""
    match error:
        case Stopped():
            return 3
        case ConfigError() | DataError() | MissingPackageError():
            return USAGE
        case _:
            return 1


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: clipstack COMMAND ...", "", *lines, "", "clipstack COMMAND --help tells more."])


if __name__ == "__main__":
    sys.exit(main())
