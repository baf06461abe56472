"""DeepSpeed behind one small class: the only file that imports it."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch

# Both are read once, when deepspeed is imported; without the second it warns that there is no GPU.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, TCPStore

from clipstack.config import Recipe
from clipstack.losses.types import Embeddings
from clipstack.model import ClipModel
from clipstack.towers import block_stacks, open_clip_weights, plain_weight
from clipstack.training.deepspeed_config import deepspeed_config
from clipstack.training.dropout import key_dropouts
from clipstack.training.optimizer import make_optimizer
from clipstack.training.separable import check_separable
from clipstack.world import World, current_world

MOMENTS = ("exp_avg", "exp_avg_sq")
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
COMPILE_BACKEND = "inductor"


def start_distributed(*, timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """Join the process group that the launcher named, or make one of a single process.

    The shared-memory extension that DeepSpeed would compile on a CPU is left out: gloo serves, and a machine
    without a compiler trains too (docs/decisions/no-compiler.md).
    """
    # torch's new names for its collectives; DeepSpeed still calls them by the old ones, which warn at every
    # call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for name, value in _lonely_launch().items():
        os.environ.setdefault(name, value)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
        _join_restartable(backend, timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    return current_world()


def _join_restartable(backend: str, timeout: timedelta) -> None:
    """Join under torchrun, whose store outlives a restart: without a prefix, ranks read the addresses of dead
    ones."""
    env = os.environ
    store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timeout)
    dist.init_process_group(
        backend,
        store=PrefixStore(f"attempt-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store),
        rank=int(env["RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        timeout=timeout,
    )


def _lonely_launch() -> dict[str, str]:
    if "RANK" in os.environ:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def stop_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class StepResult:
    """grad_norm: of the whole averaged gradient, before clipping. applied: False where it was not finite,
    which leaves weights and optimizer as they were."""

    grad_norm: float
    applied: bool


class Engine:
    """A sharded model with its optimizer. Every method is collective: all ranks call it, in the same
    order."""

    def __init__(
        self,
        model: ClipModel,
        recipe: Recipe,
        world: World,
        *,
        user_config: Mapping[str, Any] | None = None,
    ) -> None:
        assert recipe.train.precision != "auto"
        self.world = world
        self.config = deepspeed_config(
            recipe, world_size=world.size, precision=recipe.train.precision, user_config=user_config or {}
        )
        self.zero_stage = int(self.config["zero_optimization"]["stage"])
        self._is_compiled = recipe.model.compile
        self._dropout = key_dropouts(model)
        micro_batch_size = recipe.train.micro_batch_size
        if micro_batch_size is not None and micro_batch_size < recipe.train.batch_size // world.size:
            check_separable(model, micro_batch_size)
        if self._is_compiled:
            compile_blocks(model, zero_stage=self.zero_stage)
        model.to(world.device)
        self._saved_buffers = frozenset(model.towers.state_dict())
        optimizer = make_optimizer(model, recipe.optim)
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepcopy(self.config), dist_init_required=False
        )
        self.model = cast(ClipModel, self._engine.module)

    def forward(
        self, images: Tensor | None, tokens: Tensor | None, *, dropout_keys: Tensor | None = None
    ) -> Embeddings:
        """Both towers in the engine's precision; see ClipModel.forward. dropout_keys: (B,) from
        `dropout.row_keys`, needed in training only."""
        self._dropout.rows = dropout_keys
        return cast(Embeddings, self._engine(images, tokens))

    def share_statistics(self) -> None:
        """Give every rank the main rank's running statistics, such as BatchNorm's, which are the ones that
        are saved."""
        if self.world.size > 1:
            for name, buffer in self.model.towers.named_buffers():
                if name in self._saved_buffers:  # the others are constants
                    dist.broadcast(buffer, src=0, group=self.world.group)

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def encode_image(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, D) unit-norm, in fp32 and without gradient."""
        with torch.no_grad():
            return cast(Embeddings, self.model(images, None)).image

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(N, L) -> (N, D) unit-norm, in fp32 and without gradient."""
        with torch.no_grad():
            return cast(Embeddings, self.model(None, tokens)).text

    def trim_tokens(self, tokens: Tensor) -> Tensor:
        """See ClipModel.trim_tokens. A compiled model gets one length only, since it would be compiled again
        for each."""
        return tokens if self._is_compiled else self.model.trim_tokens(tokens)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean of the ranks' losses, averaged over ranks; once for each micro-batch of a
        step.

        They add up over micro-batches undivided: what a micro-batch hands in is its part of the whole loss.
        """
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch, and does nothing else

    def step(self, lr: float) -> StepResult:
        """Clip, update with learning rate `lr`, clear the gradients. A gradient that is not finite is dropped
        instead."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return self._step_unsharded() if self.zero_stage == 0 else self._step_sharded()

    def _step_sharded(self) -> StepResult:
        self._engine.step()  # DeepSpeed itself refuses a norm that is not finite, on all ranks
        return StepResult(
            grad_norm=float(self._engine.get_global_grad_norm()), applied=self._engine.was_step_applied()
        )

    def _step_unsharded(self) -> StepResult:
        norm = self._unsharded_grad_norm()
        if not bool(torch.isfinite(norm)):
            self._engine.zero_grad()
            self._engine.micro_steps += 1  # what step() would have counted
            return StepResult(grad_norm=float(norm), applied=False)
        self._engine.step()
        return StepResult(grad_norm=float(norm), applied=True)

    def _unsharded_grad_norm(self) -> Tensor:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    def weights(self) -> dict[str, Tensor]:
        """The towers' whole fp32 state on the CPU, as open_clip stores it. Complete on rank 0; elsewhere it
        may be empty."""
        if self.zero_stage < 3:
            return open_clip_weights(self.model.towers) if self.world.is_main else {}
        gathered = self._engine._zero3_consolidated_16bit_state_dict() or {}
        names = {name: name.removeprefix("towers.") for name in gathered}
        return {names[name]: plain_weight(names[name], tensor) for name, tensor in gathered.items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put whole weights, as `weights` gives them, into every rank's parameters and fp32 masters."""
        for name, parameter in self.model.towers.named_parameters():
            whole = weights[name].to(self.world.device)
            if self.zero_stage == 3:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.world.is_main:
                        parameter.data.copy_(whole.reshape(parameter.shape))
            else:
                parameter.data.copy_(whole.reshape(parameter.shape))
            if self.zero_stage > 0 and parameter.requires_grad:
                self._set_master(parameter, whole)
        for name, buffer in self.model.towers.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])

    def parts(self) -> dict[str, Tensor]:
        """This rank's part of the trained parameters, by name, to read: at stage 3 its partition; below it
        all of them on the main rank and none elsewhere."""
        if self.zero_stage == 3:
            return {name: p.ds_tensor for name, p in self._trained()}  # type: ignore[attr-defined]
        return {name: p.data for name, p in self._trained()} if self.world.is_main else {}

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From every rank's parts to whole tensors on the CPU, as `weights` gives them; complete on rank
        0."""
        if self.zero_stage < 3:
            return {name: plain_weight(name, part) for name, part in parts.items()}
        shapes = {name: p.ds_shape for name, p in self._trained()}  # type: ignore[attr-defined]
        gathered = {name: self.world.all_gather(part.flatten()) for name, part in parts.items()}
        return {
            name: plain_weight(name, flat[: shapes[name].numel()].reshape(shapes[name]))
            for name, flat in gathered.items()
        }

    def cut(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From whole tensors to this rank's parts: the inverse of `whole`."""
        if self.zero_stage < 3:
            return {
                name: whole[name].to(part.device).reshape(part.shape).clone()
                for name, part in self.parts().items()
            }
        return {
            name: self._own_part(p, whole[name].to(self.world.device)).clone() for name, p in self._trained()
        }

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's state, whole and by parameter name, on the CPU: "exp_avg.NAME", "exp_avg_sq.NAME" and
        "step".

        It says nothing of ranks or stages, so any world size and any stage can load it. Before the first step
        it is {}.
        """
        inner = self._inner_optimizer()
        if not inner.state:
            return {}
        self._link_flat_state()
        step = next(iter(inner.state.values()))["step"]
        state = {"step": torch.as_tensor(step, dtype=torch.float64, device="cpu").reshape(())}
        for name, parameter in self._trained():
            for moment in MOMENTS:
                whole = (
                    inner.state[parameter][moment]
                    if self.zero_stage == 0
                    else safe_get_full_optimizer_state(parameter, moment)
                )
                if self.world.is_main:
                    state[f"{moment}.{name}"] = whole.detach().to("cpu", copy=True)
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """What `optimizer_state` gave on rank 0, on every rank; {} puts the optimizer back to its start."""
        inner = self._inner_optimizer()
        inner.state.clear()
        if not state:
            return
        for flat in self._flat_parameters():
            step = torch.tensor(float(state["step"]), dtype=torch.float32, device=flat.device)
            inner.state[flat] = {"step": step} | {moment: torch.zeros_like(flat) for moment in MOMENTS}
        self._link_flat_state()
        for name, parameter in self._trained():
            for moment in MOMENTS:
                whole = state[f"{moment}.{name}"].to(self.world.device)
                if self.zero_stage == 0:
                    inner.state[parameter][moment].copy_(whole)
                else:
                    self._set_moment(parameter, whole, moment)

    def _link_flat_state(self) -> None:
        """Map parameters into the flat state of stages 1 and 2.

        DeepSpeed links once, after the first group's first step, when the other groups have no state yet.
        """
        if self.zero_stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return cast(
            torch.optim.Optimizer, getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        )

    def _set_master(self, parameter: nn.Parameter, whole: Tensor) -> None:
        if self.zero_stage == 3:
            safe_set_local_fp32_param(parameter, self._own_part(parameter, whole))
        else:
            safe_set_full_fp32_param(parameter, whole.reshape(parameter.shape))

    def _set_moment(self, parameter: nn.Parameter, whole: Tensor, moment: str) -> None:
        if self.zero_stage == 3:
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, whole), moment)
        else:
            safe_set_full_optimizer_state(parameter, whole.reshape(parameter.shape), moment)

    def _own_part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This rank's part at stage 3, padding included: DeepSpeed's call for whole values cannot pad."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        return F.pad(whole.flatten(), (0, size * self.world.size - whole.numel())).narrow(
            0, size * self.world.rank, size
        )

    def _flat_parameters(self) -> list[Tensor]:
        """What the inner optimizer's state is keyed by: this rank's flat partitions, or the parameters at
        stage 0."""
        if self.zero_stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self._inner_optimizer().param_groups for flat in group["params"]]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.towers.named_parameters() if p.requires_grad]


def compile_blocks(model: ClipModel, *, zero_stage: int) -> None:
    """torch.compile each transformer block, or the image tower where it has none.

    Blocks alike share what is compiled. Only `forward` is replaced: module hooks, by which stage 3 gathers
    and frees parameters, run outside; a block is one unit to them, since a compiled one cannot gather layer
    by layer.
    """
    blocks = [block for stack in block_stacks(model).values() for block in stack] or [model.towers.visual]
    if zero_stage == 3:
        set_z3_leaf_modules(model, list({type(block) for block in blocks}))
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=COMPILE_BACKEND)
