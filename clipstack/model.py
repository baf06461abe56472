"""`ClipModel`: open_clip's towers behind one `forward(images, tokens) -> Embeddings`."""

from __future__ import annotations

from typing import Any, cast

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede open_clip)
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipstack.config.models import ModelConfig
from clipstack.losses.types import Embeddings
from clipstack.towers import (
    ModelRecord,
    build_towers,
    load_open_clip_weights,
    make_record,
    pretrained_weights,
)

SIGLIP_LOGIT_BIAS = -10.0  # https://arxiv.org/abs/2303.15343, section 3.2


class ClipModel(nn.Module):
    """Paired encoders on the unit sphere with a learned, bounded temperature.

    `towers` is open_clip's own CLIP or CustomTextCLIP, its logit_scale of shape (1,): DeepSpeed's ZeRO stages
    cannot flatten a scalar. `max_logit_scale` bounds the log scale in the forward pass, because ZeRO undoes a
    clamp of the parameter itself.
    """

    def __init__(self, towers: nn.Module, record: ModelRecord, *, max_logit_scale: float) -> None:
        super().__init__()
        self.towers: Any = towers  # nn.Module types every attribute as a tensor or module
        self.record = record
        self.max_logit_scale = max_logit_scale
        self._text_can_be_trimmed = _is_causal_and_pooled_at_end(towers)

    def forward(self, images: Tensor | None, tokens: Tensor | None) -> Embeddings:
        """images: (B, 3, H, W) normalised; tokens: (B, L) int64, L <= context_length. One of them may be
        None.

        ZeRO stage 3 gathers parameters only for calls that come through here.
        """
        return Embeddings(
            image=cast(Tensor, None) if images is None else self.encode_image(images),
            text=cast(Tensor, None) if tokens is None else self.encode_text(tokens),
            logit_scale=self.bounded_logit_scale(),
            logit_bias=None if self.towers.logit_bias is None else self.towers.logit_bias.reshape(()),
        )

    def encode_image(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) normalised -> (N, D) unit-norm, fp32 or wider."""
        return _unit_norm(self.towers.encode_image(images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(N, L) int64 -> (N, D) unit-norm, fp32 or wider. L may be what `trim_tokens` leaves."""
        if self._text_can_be_trimmed:
            return _unit_norm(_encode_causal_text(cast(open_clip.CLIP, self.towers), tokens))
        return _unit_norm(self.towers.encode_text(tokens))

    def trim_tokens(self, tokens: Tensor) -> Tensor:
        """(N, context_length) -> (N, L): the columns after the last end-of-text token cut off.

        Exact: in a causal tower pooled at the end-of-text token no later position is ever read. Other towers
        get their tokens back whole. Call it before tokens go to the device, since it reads them.
        """
        if not self._text_can_be_trimmed or len(tokens) == 0:
            return tokens
        return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]

    def bounded_logit_scale(self) -> Tensor:
        """() the log of the scale, at most max_logit_scale."""
        bounded: Tensor = _BoundFromAbove.apply(self.towers.logit_scale, self.max_logit_scale)  # type: ignore[no-untyped-call]
        return bounded.reshape(())

    @property
    def embed_dim(self) -> int:
        return self.record.embed_dim

    def train(self, mode: bool = True) -> ClipModel:
        """A module whose parameters are locked keeps its running statistics as well."""
        super().train(mode)
        for module in self.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
                module.eval()
        return self


class _BoundFromAbove(torch.autograd.Function):
    """min(x, bound), whose gradient still reaches an x above the bound where a descent step would lower
    it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * ((x <= ctx.bound) | (grad > 0)), None


def _unit_norm(features: Tensor) -> Tensor:
    wide = features if features.dtype == torch.float64 else features.float()
    return F.normalize(wide, dim=-1)


def _is_causal_and_pooled_at_end(towers: nn.Module) -> bool:
    return (
        isinstance(towers, open_clip.CLIP)
        and towers.attn_mask is not None
        and towers.text_pool_type == "argmax"
    )


def _encode_causal_text(towers: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """open_clip's CLIP.encode_text for token rows of any length up to the context: (N, L) -> (N, D)."""
    length = tokens.shape[1]
    dtype = towers.transformer.get_cast_dtype()
    x = towers.token_embedding(tokens).to(dtype) + towers.positional_embedding[:length].to(
        dtype
    )  # (N, L, width)
    x = towers.transformer(x, attn_mask=towers.attn_mask[:length, :length])
    x = text_global_pool(towers.ln_final(x), tokens, towers.text_pool_type)  # (N, width)
    if towers.text_projection is None:
        return cast(Tensor, x)
    if isinstance(towers.text_projection, nn.Linear):
        return cast(Tensor, towers.text_projection(x))
    return cast(Tensor, x @ towers.text_projection)


def build_model(
    config: ModelConfig, *, seed: int, needs_logit_bias: bool = False, load_weights: bool = True
) -> ClipModel:
    """A model on the CPU in fp32, from scratch under `seed` or from `config.pretrained`. Raises ConfigError.

    load_weights: False where a checkpoint's weights will replace the pretrained ones.
    """
    record = make_record(config)
    bias = SIGLIP_LOGIT_BIAS if needs_logit_bias else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        towers = build_towers(record, init_logit_scale=config.init_logit_scale, init_logit_bias=bias)
    if config.pretrained is not None and load_weights:
        record, weights = pretrained_weights(config, record)
        if needs_logit_bias and "logit_bias" not in weights:  # trained by softmax: learned from here on
            weights = {**weights, "logit_bias": cast(Tensor, towers.logit_bias).detach()}
        load_open_clip_weights(towers, weights, source=f"model.pretrained = {config.pretrained!r}")
    model = ClipModel(towers, record, max_logit_scale=config.max_logit_scale)
    if config.lock_image:
        model.towers.lock_image_tower()
    if config.lock_text:
        _lock_text(towers)
    if config.grad_checkpointing:
        model.towers.set_grad_checkpointing(True)
    return model.train()


def _lock_text(towers: nn.Module) -> None:
    """Freeze the whole text tower, embeddings and projection too; open_clip's own lock needs a Hugging Face
    tower."""
    for name, parameter in towers.named_parameters():
        if not name.startswith("visual.") and name not in ("logit_scale", "logit_bias"):
            parameter.requires_grad_(False)
