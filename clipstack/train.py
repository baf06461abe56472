"""What `deepspeed clipstack/train.py`, `torchrun clipstack/train.py` and `clipstack train` run: parse, build,
fit."""

# ruff: noqa: E402 - the path has to be right before anything of ours is imported
from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, Python looks for modules in this folder first, where ours would shadow others: look in the
# one above.
_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)

from clipstack.stopping import StopRequest, end_with_launcher

if __name__ == "__main__":
    end_with_launcher()  # before the imports below, which take seconds

import argparse
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from clipstack.config import Recipe, load_recipe
from clipstack.config.help import help_config, recipe_advice
from clipstack.errors import ClipstackError, ConfigError, DataError, MissingPackageError
from data_pipelines.installing import naming_extra
from data_pipelines.one_line_parser import OneLineParser

if TYPE_CHECKING:
    from clipstack.world import World

GRACE_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code: 0 done, 1 failed, 2 wrong input, 3 stopped but resumable."""
    end_with_launcher()
    args = _parse(argv)
    if args.help_config:
        print(help_config())
        return 0
    try:
        if args.config is None:
            raise ConfigError("--config: missing; name a recipe, such as configs/demo.toml")
        with naming_extra("clipstack train", "train"):
            return run(load_recipe(args.config, args.overrides), args)
    except ClipstackError as error:
        return _fail(error)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        print(f"error: {_about_lost_peer(error)}", file=sys.stderr, flush=True)
        return 1


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank: gloo's errors have no type of their own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _about_lost_peer(error: RuntimeError) -> str:
    cause = str(error).strip().splitlines()[0].split(". ")[0]
    if "imed out" in cause:
        cause += "; train.collective_timeout_s says how long a rank waits"
    return (
        f"another rank ended or did not answer ({cause}); its own message tells why, and the same command "
        "resumes from the last checkpoint"
    )


def run(recipe: Recipe, args: argparse.Namespace) -> int:
    """Build everything that the recipe names, then train it."""
    stop = StopRequest()
    with stop.listening(), ExitStack() as held:
        with stop.leaving_at_once():
            start = _build(recipe, args, stop, held)
        return start()


def _build(recipe: Recipe, args: argparse.Namespace, stop: StopRequest, held: ExitStack) -> Callable[[], int]:
    """What there is to do, ready to start; calling it gives the exit code. held: what is let go of after
    it."""
    from clipstack.model import build_model
    from clipstack.preprocess import Preprocess
    from clipstack.training.deepspeed_config import read_user_config, user_precision
    from clipstack.training.engine import Engine, start_distributed
    from clipstack.training.flops import peak_seconds_per_sample
    from clipstack.training.precision import resolve_precision
    from clipstack.training.run_data import find_data, open_data
    from clipstack.training.run_folder import prepare, write_recipe
    from clipstack.training.run_lock import RunLock

    user_config = read_user_config(args.deepspeed_config)
    world = start_distributed(timeout=timedelta(seconds=recipe.train.collective_timeout_s))
    check_batch(recipe, world)
    if not args.dry_run:
        lock = held.enter_context(RunLock(recipe.run.dir))
        world.from_main(lambda: lock.take(at_most_s=recipe.train.collective_timeout_s / 2))
    plan = world.from_main(lambda: prepare(recipe, fresh=args.fresh, dry_run=args.dry_run))
    if plan.is_finished:
        how = f"finished at step {plan.step}; nothing to do (raise train.steps to go on)"
        _say(world, f"{recipe.run.dir}: {how}")
        return lambda: 0
    for line in plan.messages:
        _say(world, line)
    world.together(lambda: find_data(recipe.data))  # before a model is downloaded or built
    model = world.together(
        lambda: build_model(
            recipe.model,
            seed=recipe.seed,
            needs_logit_bias=recipe.objective.name == "siglip",
            load_weights=plan.resume_from is None,
        )
    )
    resolved = resolve_precision(plan.recipe, model, world, decided=user_precision(user_config))
    if args.dry_run:
        from clipstack.training.dry_run import dry_run

        return partial(dry_run, resolved, model, world, user_config)
    snapshot = world.together(lambda: plan.load(model))
    preprocess = Preprocess.from_record(model.record, augment=resolved.data.augment)
    loader = open_data(resolved, preprocess, world, resume_from=snapshot)
    world.from_main(lambda: write_recipe(resolved))
    assert resolved.train.precision != "auto"
    peak_s = peak_seconds_per_sample(model, world, resolved.train.precision)
    engine = Engine(model, resolved, world, user_config=user_config)
    if snapshot is not None:
        engine.load_optimizer_state(snapshot.optimizer)
    return partial(
        _fit, resolved, engine, loader, world=world, resume_from=snapshot, stop=stop, peak_s_per_sample=peak_s
    )


def _fit(*args: Any, **options: Any) -> int:
    from clipstack.training.engine import stop_distributed
    from clipstack.training.trainer import fit

    outcome = fit(*args, **options)
    stop_distributed()
    return outcome.value


def check_batch(recipe: Recipe, world: World) -> None:
    """Raises ConfigError where the batch cannot be cut into equal shares, or a share into micro-batches."""
    size = recipe.train.batch_size
    world.check_batch(size)
    share, micro = size // world.size, recipe.train.micro_batch_size
    if micro is not None and (micro > share or share % micro):
        fitting = max(m for m in range(1, share + 1) if share % m == 0 and m <= micro)
        raise ConfigError(
            f"train.micro_batch_size = {micro}: does not divide the rank's share of {share}; take {fitting}, "
            "or remove it"
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser("clipstack train", "Pretrain or fine-tune a CLIP-style model from a recipe.")
    parser.advice = _advice
    parser.add_argument("--config", type=Path, metavar="RECIPE.toml", help="the recipe")
    parser.add_argument(
        "--deepspeed_config", type=Path, metavar="DS.json", help="sharding and precision for DeepSpeed"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the first batch, sizes and memory; train nothing"
    )
    parser.add_argument("--fresh", action="store_true", help="refuse a run folder that has checkpoints")
    parser.add_argument(
        "--help-config", action="store_true", help="every key of a recipe, with unit and meaning"
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher puts it in front
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values, such as optim.lr=1e-3"
    )
    return parser.parse(sys.argv[1:] if argv is None else argv)


def _advice(flag: str, value: str) -> str | None:
    if flag == "--deepspeed":  # what other trainers ask for
        return "leave it out, DeepSpeed always runs"
    return recipe_advice(flag, value)


def _say(world: World, line: str) -> None:
    if world.is_main:
        print(line, file=sys.stderr, flush=True)


def _fail(error: ClipstackError) -> int:
    """One line on stderr, from one rank: an error of all ranks ends this one before its wait is over."""
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_S)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, ConfigError | DataError | MissingPackageError) else 1


def _main_and_exit() -> None:
    """Skip interpreter shutdown: after an error, leaving the process group politely would wait for the other
    ranks."""
    code = 1
    try:
        code = main()
    except SystemExit as stop:  # argparse's, for --help or a wrong flag
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _main_and_exit()
