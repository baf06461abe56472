"""`clipstack serve`: flags, made from the settings one for one, and the run."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

from clipstack.checkpoint import has_model
from clipstack.errors import ConfigError
from serve.listening import listen, url_of
from serve.security import hash_token
from serve.settings import ENV_PREFIX, ModelSpec, Settings, load_settings

DEMO_RUN = Path("runs/demo")
_OWN_FLAGS = frozenset(("models", "load_in_background"))

_UNITS = {
    "_per_s": "N",
    "_bytes": "BYTES",
    "_pixels": "PIXELS",
    "_chars": "CHARACTERS",
    "_ms": "MILLISECONDS",
    "_s": "SECONDS",
    "port": "PORT",
    "gallery": "FOLDER",
}
"""What --help calls a value, by the end of its setting's name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `clipstack serve`; each setting also goes into the environment or the settings file."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="[ID=]M",
        help="run folder, exported folder or open_clip name; may be given several times "
        f"(default: {DEMO_RUN}, where it holds one)",
    )
    parser.add_argument(
        "--pretrained", metavar="W", help="with an open_clip name: a safetensors file or a tag"
    )
    parser.add_argument("--settings", type=Path, metavar="FILE", help="TOML file of settings")
    parser.add_argument(
        "--hash-token", action="store_true", help="read a token from standard input, print its hash, and stop"
    )
    group = parser.add_argument_group("settings", f"each also as {ENV_PREFIX}NAME in the environment")
    for name, field in Settings.model_fields.items():
        if name not in _OWN_FLAGS:
            flag = "--" + name.replace("_", "-")
            group.add_argument(
                flag, **_options(name, field.annotation, field.default, field.description or "")
            )


def _options(name: str, annotation: Any, default: Any, description: str) -> dict[str, Any]:
    text = description.replace("%", "%%")
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "default": None, "dest": name, "help": text}
    shown = "" if default in (None, "", ()) else f" (default: {default})"
    metavar = "A,B,..." if get_origin(annotation) is tuple else _metavar(name, annotation)
    return {"dest": name, "default": None, "metavar": metavar, "help": text + shown}


def _metavar(name: str, annotation: Any) -> str:
    """What stands for the value in --help: its choices, its unit, or what kind of thing it is."""
    values = [str(value) for value in get_args(annotation) if isinstance(value, str)]
    if values:
        return "{" + ",".join(values) + "}"
    unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), None)
    return unit or ("N" if annotation in (int, float) else name.rpartition("_")[2].upper())


def settings_of(args: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Flags over environment over file over defaults; the demo model where none is named.

    Raises ConfigError.
    """
    flags = {name: getattr(args, name) for name in Settings.model_fields if name not in _OWN_FLAGS}
    flags = {name: value for name, value in flags.items() if value is not None}
    if args.model:
        flags["models"] = args.model
    named = args.settings or environ.get(ENV_PREFIX + "SETTINGS")
    file = Path(named) if named else None
    settings = load_settings(flags, environ=environ, file=file)
    if not settings.models and has_model(DEMO_RUN):
        settings = load_settings({**flags, "models": [str(DEMO_RUN)]}, environ=environ, file=file)
    models = _with_pretrained(settings.models, args.pretrained)
    return settings.model_copy(update={"models": models, "load_in_background": True})


def _with_pretrained(models: tuple[ModelSpec, ...], pretrained: str | None) -> tuple[ModelSpec, ...]:
    if pretrained is None:
        return models
    if len(models) != 1:
        raise ConfigError(
            f"pretrained = {pretrained!r}: belongs to exactly one --model, and there are {len(models)}"
        )
    return (models[0].model_copy(update={"pretrained": pretrained}),)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal. Returns the exit status; raises ClipstackError for the user's mistakes."""
    if args.hash_token:
        token = sys.stdin.readline().strip()
        if not token:
            raise ConfigError("--hash-token: no token on standard input; write it there, on one line")
        print(hash_token(token))
        return 0
    settings = settings_of(args, os.environ)
    settings.check_models()
    sockets = listen(settings.host, settings.port)
    try:
        return _serve(settings, sockets)
    finally:
        for listener in sockets:
            listener.close()


def _serve(settings: Settings, sockets: list[socket.socket]) -> int:
    """The imports take seconds; what connects meanwhile waits in the sockets."""
    on_terminal = sys.stderr.isatty()
    if on_terminal:
        _say(f"loading {', '.join(spec.id for spec in settings.models)} ...")
    # GNU OpenMP's threads spin for milliseconds after each parallel region by default, and so take the cores
    # from the threads that decode. This keeps them awake between the regions of one forward pass and lets
    # them sleep after it.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from serve.app import create_app
    from serve.logs import configure_logging
    from serve.server import run_server
    from serve.service import is_still_loading

    configure_logging(settings.log_level)
    ready = partial(_say, f"ready: {url_of(settings.host, sockets)}") if on_terminal else None
    status = run_server(create_app(settings), settings, sockets, on_ready=ready)
    if is_still_loading():  # the interpreter would wait for that
        logging.shutdown()
        os._exit(status)
    return status


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":  # for installations without the `clipstack` command on the path
    from clipstack.cli import main

    sys.exit(main(["serve", *sys.argv[1:]]))
