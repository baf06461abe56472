"""Our trainer and open_clip's as commands for one and the same job, and what their logs say; train.py and
quality.py share it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEER_SCRIPT = Path(__file__).resolve().with_name("train_open_clip.py")
MODEL_NAME = "benchmark"
"""What the peer calls a model that is given as tables."""
POLL_S = 0.01
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


@dataclass(frozen=True)
class Ran:
    """A finished training: its lines, when each arrived and what it cost.

    arrived_s: seconds from the start of the process; cpu_s: processor time of all its processes, start and
    end included; device_memory_gib: the most that the GPU held, None on a CPU.
    """

    lines: list[StepLine]
    arrived_s: list[float]
    wall_s: float
    cpu_s: float
    command: list[str]
    log: Path
    device_memory_gib: float | None = None


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
    from clipstack.config import ModelConfig
    from clipstack.model import make_record

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


# ---- Running either ----


@dataclass
class _Tail:
    """The lines of a growing file, each once and whole."""

    path: Path
    _read: int = 0
    _rest: str = field(default="")

    def new_lines(self) -> list[str]:
        if not self.path.exists() or self.path.stat().st_size == self._read:
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        *whole, self._rest = (self._rest + data.decode("utf-8", errors="replace")).split("\n")
        return whole


def run(command: Sequence[str], log: Path, parse: Callable[[str], StepLine | None], job: Job) -> Ran:
    """Run a trainer to its end, noting from outside when each line of its log arrives: the same ruler for
    both.

    Raises RuntimeError with the end of its output where it fails.
    """
    output = log.parents[1] / "output.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [*_binding(job.cores), *command]
    tail, lines, arrived, memory = _Tail(log), [], [], _Memory(job.device)
    began = time.perf_counter()
    with output.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=_environ(job))
        try:
            cpu_s = None
            while cpu_s is None:
                cpu_s = _cpu_s_of_ended(process)
                now = time.perf_counter() - began
                for line in filter(None, map(parse, tail.new_lines())):
                    lines.append(line)
                    arrived.append(now)
                memory.look()
                time.sleep(POLL_S)
        finally:
            if process.returncode is None:
                process.terminate()
                process.wait(60)
    wall_s = time.perf_counter() - began
    if process.returncode != 0 or not lines:
        end = output.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{end}")
    return Ran(lines, arrived, wall_s, cpu_s, list(command), log, memory.most_gib)


def _cpu_s_of_ended(process: subprocess.Popen[bytes]) -> float | None:
    """Processor seconds of a process and of the children that it waited for; None while it runs."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def _binding(cores: Sequence[int]) -> list[str]:
    taskset = shutil.which("taskset")
    return [taskset, "-c", ",".join(map(str, cores))] if cores and taskset else []


def _environ(job: Job) -> dict[str, str]:
    quiet = {"DS_ACCELERATOR": "cpu"} if job.device == "cpu" else {}
    threads = {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    return {**os.environ, **quiet, **threads, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


class _Memory:
    """The most memory that the GPU held, asked of the driver once a second, so that both are asked alike."""

    def __init__(self, device: str) -> None:
        self.most_gib: float | None = None
        self._tool = shutil.which("nvidia-smi") if device == "cuda" else None
        self._next = 0.0

    def look(self) -> None:
        if self._tool is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 1.0
        asked = [self._tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        used = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        self.most_gib = max(self.most_gib or 0.0, max(map(float, used)) / 1024)


def hidden(text: str, folders: Mapping[str, Path | str]) -> str:
    """`text` with this machine's paths replaced by what they are; the longest first, as one may lie in
    another."""
    for name, path in sorted(folders.items(), key=lambda item: -len(str(item[1]))):
        text = text.replace(str(path), name)
    return text


def keep_logs(folder: Path, ran: Ran, out: Path, folders: Mapping[str, Path | str]) -> None:
    """Copy what tells how a trainer was run, its log and its recipe or parameters, without this machine's
    paths."""
    out.mkdir(parents=True, exist_ok=True)
    written = (
        ran.log,
        ran.log.with_name("params.txt"),
        folder / "recipe.toml",
        folder / f"{MODEL_NAME}.json",
    )
    for path in filter(Path.is_file, written):
        text = path.read_text(encoding="utf-8", errors="replace")
        (out / path.name).write_text(hidden(text, folders), encoding="utf-8")


# ---- What the figures mean ----


def steady_rate(ran: Ran, *, batch_size: int, skip: int, tail: int) -> float:
    """Samples a second between two steps, by when their lines arrived.

    Left out are the first `skip` lines (start, first allocations, batches that the loader had ready) and the
    last `tail` (a loader that has nothing more to do leaves its core to the rest).
    """
    last = len(ran.lines) - 1 - tail
    if last <= skip:
        raise ValueError(f"{len(ran.lines)} lines are too few to leave out {skip} and {tail}")
    steps = ran.lines[last].step - ran.lines[skip].step
    return steps * batch_size / (ran.arrived_s[last] - ran.arrived_s[skip])


def logged_seconds(lines: Sequence[StepLine], *, batch_size: int) -> float:
    """Seconds of training by the trainer's own log, which has a line for each step: from the first wait for
    data to the end of the last step."""
    if [line.step for line in lines] != list(range(1, len(lines) + 1)):
        raise ValueError("the log does not have one line for each step")
    return sum(batch_size / line.rate for line in lines)


@dataclass(frozen=True)
class Spread:
    """Median, least and most of some figures."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g}-{self.most:.3g})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours by theirs, round by round."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def alternating(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): A B, B A, A B, ..., so that a drift of the machine hits all alike."""
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            yield number, name


def versions(python: str) -> dict[str, str]:
    """Versions of what matters in an environment."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        "names = ('torch', 'torchvision', 'open_clip_torch', 'webdataset', 'transformers', 'deepspeed')\n"
        "have = {d.metadata['Name'].lower().replace('-', '_'): d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version(), **{n: have[n] for n in names if n in have}}))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code], text=True))
    return found


def machine() -> dict[str, Any]:
    """The processor, how many cores of it there are, and how busy it was just now."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {
        "processor": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
