"""Who takes part in a job, and the few collectives that the rest of the code uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from clipstack.errors import ClipstackError, ConfigError

T = TypeVar("T")
# torch 2.13 renamed it; the old name warns there and the new one is missing before.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class World:
    """One process among `size`. With size 1 no process group is needed and every collective is the
    identity."""

    rank: int = 0
    """0 to size - 1; 0 is the main one, which alone prints and writes."""
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Of this process: where its model and its tensors for collectives are."""
    group: dist.ProcessGroup | None = None
    """None: torch's default group, where there is more than one process."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def check_batch(self, batch_size: int) -> None:
        """Raises ConfigError where `train.batch_size` cannot be cut into equal shares."""
        if batch_size % self.size:
            raise ConfigError(
                f"train.batch_size = {batch_size}: not divisible by {self.size} ranks; take "
                f"{batch_size // self.size * self.size or self.size}"
            )

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(B, ...) on each rank -> (size * B, ...) on all, in rank order. No gradient. Equal shapes on all
        ranks. Collective."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        out = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        _all_gather(out, tensor, group=self.group)
        return out

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """A new tensor, reduced over the ranks. No gradient. Collective."""
        if self.size == 1:
            return tensor.clone()
        out = tensor.clone()
        dist.all_reduce(out, op=op, group=self.group)
        return out

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks. Collective."""
        return self.all_reduce(tensor) / self.size

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on at least one. Collective."""
        return bool(self.all_reduce(torch.tensor(int(flag), device=self.device), op=dist.ReduceOp.MAX).item())

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Small, rare things only. Collective."""
        if self.size == 1:
            return [value]
        out: list[T | None] = [None] * self.size
        dist.all_gather_object(out, value, group=self.group)
        return cast(list[T], out)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; a ClipstackError that it raises there is raised on
        every rank.

        For work that one process does (reading a folder, writing a file) and all must agree on. Collective.
        """
        if self.size == 1:
            return make()
        box: list[T | ClipstackError | None] = [None]
        if self.is_main:
            try:
                box = [make()]
            except ClipstackError as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, group=self.group, device=self.device)
        if isinstance(box[0], ClipstackError):
            raise box[0]
        return cast(T, box[0])

    def together(self, make: Callable[[], T]) -> T:
        """What `make` returns on each rank; where it raises a ClipstackError on one, all raise.

        For what every rank does by itself and may fail at alone, such as reading files: no rank is left
        waiting in the next collective. `make` must not be collective. Collective.
        """
        failure: ClipstackError | None = None
        try:
            made = make()
        except ClipstackError as error:
            failure = error
        failures = self.gather_objects(failure)
        if failure is not None:
            raise failure
        for rank, other in enumerate(failures):
            if other is not None:
                raise type(other)(f"rank {rank}: {other}")
        return made

    def barrier(self) -> None:
        """Collective."""
        if self.size > 1:
            dist.barrier(group=self.group)


def current_world() -> World:
    """The world of the default process group where one exists, else a world of one."""
    if not (dist.is_available() and dist.is_initialized()):
        return World(device=_local_device())
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=_local_device())


def _local_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def joined_world(device: str | None) -> Iterator[World]:
    """The world of this command: all ranks of a launcher, else a world of one. Raises ConfigError.

    device: as torch names it; none is a GPU where there is one. Under a launcher each rank takes its own GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _chosen_device(device, is_launched=size > 1)
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


def _chosen_device(name: str | None, *, is_launched: bool) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no such device; take cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch finds no GPU here; take cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if is_launched else 0)
    return device
