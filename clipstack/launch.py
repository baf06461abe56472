"""Joins the ranks that a launcher (torchrun, deepspeed) started, for commands that need no DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from clipstack.errors import ConfigError
from clipstack.world import World


@contextmanager
def joined_world(device: str | None) -> Iterator[World]:
    """The world of this command: all ranks of a launcher, else a world of one. Raises ConfigError.

    device: as torch names it; none is a GPU where there is one. Under a launcher each rank takes its own GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, is_launched=size > 1)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(device=chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=chosen)
    finally:
        dist.destroy_process_group()


def _device(name: str | None, *, is_launched: bool) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no such device; take cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch finds no GPU here; take cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if is_launched else 0)
    return device
