"""Our trainer and open_clip's as commands for one and the same job, and what their logs say."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEER_SCRIPT = Path(__file__).resolve().with_name("train_open_clip.py")
MODEL_NAME = "benchmark"
"""What the peer calls a model that is given as tables."""
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One training that both trainers are asked for. Values are those of a recipe of ours."""

    recipe: Table
    """A whole recipe as tables; `run.dir` is added."""
    num_epochs: int = 1
    """Parts that the peer cuts the steps into: it knows epochs, and reshuffles at each."""
    threads: int = 1
    ranks: int = 1
    device: str = "cpu"
    cores: tuple[int, ...] = ()
    """Cores that the processes are bound to, where the machine can; none: all."""


@dataclass(frozen=True)
class StepLine:
    """One logged step. rate: samples a second since the line before; loss: of the objective; scale: the
    factor on the cosines."""

    step: int
    rate: float
    loss: float
    scale: float


# ---- Ours ----


def our_command(job: Job, folder: Path) -> tuple[list[str], Path]:
    """The command, and the log it writes. The recipe is written into `folder`."""
    from clipstack.config import parse_recipe, to_toml

    recipe = parse_recipe({**job.recipe, "run": {"dir": str(folder / "run")}})
    path = folder / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    log = folder / "run" / "metrics.jsonl"
    if job.ranks == 1:
        return [sys.executable, "-m", "clipstack.cli", "train", "--config", str(path)], log
    launcher = Path(sys.executable).with_name("deepspeed")
    script = ROOT / "clipstack" / "train.py"
    ranks = ["--quiet", "--num_accelerators", str(job.ranks)]
    return [str(launcher), *ranks, str(script), "--config", str(path)], log


def our_line(line: str) -> StepLine | None:
    """A line of metrics.jsonl; None for an event."""
    values = json.loads(line)
    if "event" in values:
        return None
    scale = math.exp(values["logit_scale"])
    return StepLine(values["step"], values["samples_per_s"], values["clip_loss"], scale)


# ---- open_clip's ----


def peer_command(job: Job, folder: Path, *, python: str) -> tuple[list[str], Path]:
    """The command, and the log it writes. The model's config is written into `folder`.

    Raises ValueError where the peer cannot do the job.
    """
    model, config = peer_model(job.recipe["model"])
    path = folder / f"{MODEL_NAME}.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if job.ranks > 1 and job.device == "cpu":
        raise ValueError("open_clip's trainer gives DDP a device id, which torch refuses on a CPU")
    launcher = [] if job.ranks == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(job.ranks)]
    arguments = [
        *peer_arguments(job),
        "--model", model, "--logs", str(folder / "logs"), "--name", "run",
    ]  # fmt: skip
    log = folder / "logs" / "run" / "out.log"
    return [python, "-P", *launcher, str(PEER_SCRIPT), str(path), *arguments], log


def peer_model(model: str | Table) -> tuple[str, Table]:
    """(name, config file): one of open_clip's own by name, or ours as tables."""
    if isinstance(model, str):
        return model, {}
    name = model.get("name")
    if name is not None:
        return str(name), {}
    return MODEL_NAME, {key: model[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}


def peer_arguments(job: Job) -> list[str]:
    """open_clip's flags for a recipe's values."""
    recipe = job.recipe
    train, optim, data = recipe["train"], recipe["optim"], recipe["data"]
    steps, batch = train["steps"], train["batch_size"]
    if steps % job.num_epochs or batch % job.ranks:
        raise ValueError(
            f"{steps} steps of {batch} do not part into {job.num_epochs} epochs, {job.ranks} ranks"
        )
    if (steps // job.num_epochs) % max(1, data["workers"]):
        raise ValueError("the peer rounds the batches of an epoch up to a multiple of its workers")
    low, high = data.get("augment", {}).get("crop_scale", (0.9, 1.0))
    flags: dict[str, Any] = {
        "train-data": data["train"],
        "dataset-type": "webdataset",
        "train-num-samples": steps // job.num_epochs * batch,
        "epochs": job.num_epochs,
        "batch-size": batch // job.ranks,
        "workers": data["workers"],
        "precision": {"fp32": "fp32", "bf16": "amp_bf16"}[train["precision"]],
        "lr": optim["lr"],
        "beta1": optim["betas"][0],
        "beta2": optim["betas"][1],
        "eps": optim.get("eps", 1e-6),
        "wd": optim["weight_decay"],
        "warmup": round(optim.get("warmup_fraction", 0.05) * steps),
        "grad-clip-norm": optim.get("grad_clip_norm", 1.0),
        "seed": recipe.get("seed", 0),
        "log-every-n-steps": recipe["log"]["every_steps"],
        "save-frequency": 0,
        "device": job.device,
    }
    switches = ["--local-loss", "--gather-with-grad"] if job.ranks > 1 else []
    if isinstance(recipe["model"], Mapping) and recipe["model"].get("compile"):
        switches.append("--torchcompile")
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*given, *switches, "--aug-cfg", f"scale=({low},{high})"]


PEER_LINE = re.compile(
    r"Train Epoch: (?P<epoch>\d+) \[ *(?P<seen>\d+)/(?P<samples>\d+) .*?, (?P<rate>[\d.e+]+)/s, .*"
    r"Logit Scale: (?P<scale>[\d.]+) .*\bLoss: (?P<loss>[\d.naninf+-]+)"
)


def peer_line(line: str, *, batch_size: int) -> StepLine | None:
    """A line of out.log; None for one that tells of no step."""
    found = PEER_LINE.search(line)
    if found is None:
        return None
    seen = int(found["epoch"]) * int(found["samples"]) + int(found["seen"])
    return StepLine(seen // batch_size, float(found["rate"]), float(found["loss"]), float(found["scale"]))


def export_peer(checkpoint: Path, model: Table, out: Path) -> Path:
    """open_clip's training checkpoint as a model folder that both open_clip and `clipstack eval` load."""
    from clipstack.config.models import ModelConfig
    from clipstack.towers import make_record

    import torch  # isort: skip
    from safetensors.torch import save_file

    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    out.mkdir(parents=True, exist_ok=True)
    record = make_record(ModelConfig.model_validate(model))
    (out / "open_clip_config.json").write_text(record.to_json(), encoding="utf-8")
    save_file(
        {name.removeprefix("module."): tensor.contiguous() for name, tensor in weights.items()},
        out / "open_clip_model.safetensors",
    )
    return out
