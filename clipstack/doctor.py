"""`clipstack doctor`: what works on this machine, and how to get what does not."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from clipstack.errors import ConfigError, how_to_install, how_to_reinstall

OK, MISSING, BROKEN = "ok", "missing", "broken"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. fix: what to do about it; empty where it works."""

    name: str
    state: str
    detail: str
    fix: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 where something that is installed does not work."""
    findings = examine()
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print("\n".join(_line(finding) for finding in findings))
    return 1 if any(finding.state == BROKEN for finding in findings) else 0


def examine() -> list[Finding]:
    """Look at everything, cheap things first."""
    return [
        _python(),
        _machine(),
        _part("open_clip", "model", "open_clip_torch", _try_open_clip),
        _part("torch", "model", "torch", _try_torch),
        _part("deepspeed", "train", "deepspeed", _try_launcher),
        _part("webdataset", "train", "webdataset", _try_import("webdataset")),
        _part("fast JPEG decode", "train", "simplejpeg", _try_jpeg),
        _part("REST server", "serve", "fastapi", _try_import("serve.app")),
        _part("OpenVINO engine", "openvino", "openvino", _try_openvino),
        _part("data tools", "data", "polars", _try_import("polars", "pyarrow", "datasketch")),
        _part("linear probe", "eval", "scikit-learn", _try_import("sklearn")),
        _part("ONNX export", "onnx", "onnxruntime", _try_import("onnx", "onnxscript", "onnxruntime")),
        _part("TensorBoard", "tensorboard", "tensorboard", _try_import("tensorboard")),
        _part("Weights & Biases", "wandb", "wandb", _try_import("wandb")),
    ]


def _line(finding: Finding) -> str:
    mark = {OK: "ok     ", MISSING: "missing", BROKEN: "BROKEN "}[finding.state]
    fix = f"\n{'':10}fix: {finding.fix}" if finding.fix else ""
    return f"{mark}  {finding.name}: {finding.detail}{fix}"


def _python() -> Finding:
    version = platform.python_version()
    return Finding("Python", OK, f"{version} on {platform.system()} {platform.machine()}")


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    return Finding("Machine", OK, f"{cores} cores, {free_gb:.0f} GB free on this disk")


def _part(name: str, extra: str, package: str, attempt: Callable[[], str]) -> Finding:
    """Whether a part is installed, and whether it really works."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, MISSING, f"{package} is not installed", how_to_install(extra))
    try:
        return Finding(name, OK, f"{package} {version}{attempt()}")
    except ModuleNotFoundError as error:
        return Finding(name, BROKEN, f"{package} {version} needs {error.name}", how_to_install(extra))
    except (ImportError, OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        detail = f"{package} {version} does not work: {first}"
        return Finding(name, BROKEN, detail, how_to_reinstall(package))


def _try_import(*modules: str) -> Callable[[], str]:
    def attempt() -> str:
        for module in modules:
            importlib.import_module(module)
        return ""

    return attempt


def _try_open_clip() -> str:
    importlib.import_module("clipstack.torchvision_compat")
    return f", {len(importlib.import_module('open_clip').list_models())} architectures"


def _try_torch() -> str:
    import torch

    product = torch.ones(64, 64) @ torch.ones(64, 64)
    if float(product[0, 0]) != 64.0:
        raise RuntimeError("a matrix product came out wrong")
    if not torch.cuda.is_available():
        return f", CPU with {torch.get_num_threads()} threads, no CUDA device"
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f", CUDA {torch.version.cuda}: {names}"


def _try_launcher() -> str:
    launcher = Path(sys.executable).with_name("deepspeed")
    found = str(launcher) if launcher.exists() else shutil.which("deepspeed")
    if found is None:
        raise RuntimeError("the deepspeed command is not on PATH")
    return f", launcher {found}"


def _try_openvino() -> str:
    runtime = importlib.import_module("serve.openvino_runtime")
    try:
        runtime.import_openvino()  # not by itself: it would report its use to its makers
    except ConfigError as error:
        raise ImportError(str(error)) from error
    return ""


def _try_jpeg() -> str:
    import numpy as np
    import simplejpeg
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(buffer, "JPEG")
    pixels = simplejpeg.decode_jpeg(buffer.getvalue())
    if pixels.shape != (16, 16, 3) or not np.all(pixels[..., 0] > 150):
        raise RuntimeError("a JPEG was decoded wrong")
    return ""
