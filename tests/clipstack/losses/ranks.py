"""Runs a function on several real gloo ranks of this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from clipstack.world import World, current_world


def run_ranks(function: Callable[..., Any], size: int, folder: Path, *args: Any) -> list[Any]:
    """What `function(world, *args)` returned on each rank. `function` stands at the top of a module; results
    are torch.save-able.
    """
    # Forked from a server that has imported torch once, and computed nothing.
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch", "torch.distributed", "clipstack.losses"]
    )
    mp.start_processes(_on_rank, (size, str(folder), function, args), nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(size)]


def _on_rank(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    world: World = current_world()
    torch.save(function(world, *args), Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()
