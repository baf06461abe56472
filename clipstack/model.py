"""open_clip's towers behind one `forward(images, tokens) -> Embeddings`, and the record that rebuilds
them."""

from __future__ import annotations

import difflib
import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede open_clip)
import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import load_state_dict
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import text_global_pool
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipstack.config import ModelConfig
from clipstack.errors import CheckpointError, ConfigError
from clipstack.losses.types import Embeddings

SIGLIP_LOGIT_BIAS = -10.0  # https://arxiv.org/abs/2303.15343, section 3.2


@dataclass(frozen=True)
class ModelRecord:
    """What open_clip needs to rebuild a model: the two tables of an open_clip_config.json."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(
            {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}, indent=2, sort_keys=True
        )

    @property
    def context_length(self) -> int:
        return int(self.model_cfg["text_cfg"].get("context_length", 77))

    @property
    def embed_dim(self) -> int:
        return int(self.model_cfg["embed_dim"])


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
        record, weights = _pretrained(config, record)
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


def make_record(config: ModelConfig) -> ModelRecord:
    """The open_clip tables of a model config. Raises ConfigError, with the nearest name, for an unknown
    one."""
    if config.name is None:
        tables = {"embed_dim": config.embed_dim, "vision_cfg": config.vision_cfg, "text_cfg": config.text_cfg}
        return record_of_tables({**tables, "quick_gelu": True} if config.quick_gelu else tables)
    tables = named_tables(config.name, key="model.name")
    return record_of_tables({**tables, "quick_gelu": True} if config.quick_gelu else tables)


def named_tables(name: str, *, key: str, or_folder: bool = False) -> dict[str, Any]:
    """open_clip's config of an architecture name. or_folder: it might have been meant as one. Raises
    ConfigError, with the nearest name, for an unknown one."""
    tables = open_clip.get_model_config(name.replace("/", "-"))
    if tables is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}?" if near else "open_clip.list_models() names them"
        folder = "there is no such folder, and " if or_folder else ""
        raise ConfigError(f"{key} = {name!r}: {folder}open_clip has no such architecture; {hint}")
    if "multimodal_cfg" in tables:
        raise ConfigError(
            f"{key} = {name!r}: CoCa's captioning decoder is not supported; take a CLIP architecture"
        )
    return cast(dict[str, Any], tables)


def record_of_tables(
    model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any] | None = None
) -> ModelRecord:
    """Fill what open_clip would fill: by default pictures are sized for the vision tower."""
    default = PreprocessCfg(size=model_cfg["vision_cfg"].get("image_size", 224))
    merged = merge_preprocess_dict(default, preprocess_cfg or {})
    size = merged["size"]
    if not isinstance(size, int) and size[0] == size[1]:
        merged["size"] = size[0]  # open_clip writes one number or two: equal models have equal records
    return ModelRecord(model_cfg=dict(model_cfg), preprocess_cfg=json.loads(json.dumps(merged)))


def build_towers(
    record: ModelRecord, *, init_logit_scale: float | None = None, init_logit_bias: float | None = None
) -> nn.Module:
    """open_clip's module with random weights from the global torch generator. Raises ConfigError for bad
    tables."""
    tables = {key: value for key, value in record.model_cfg.items() if key != "custom_text"}
    text = dict(tables["text_cfg"])
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    tables |= {"text_cfg": text, "nonscalar_logit_scale": True}
    if init_logit_scale is not None:
        tables["init_logit_scale"] = init_logit_scale
    if init_logit_bias is not None:
        tables["init_logit_bias"] = init_logit_bias
    custom = record.model_cfg.get("custom_text", False) or "hf_model_name" in text
    try:
        return cast(nn.Module, (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**tables))
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(
            f"model: open_clip cannot build these towers ({error}); check vision_cfg and text_cfg"
        ) from error


def open_clip_weights(towers: nn.Module) -> dict[str, Tensor]:
    """The towers' state as plain open_clip stores it: contiguous CPU tensors, logit_scale and logit_bias
    scalars."""
    return {name: plain_weight(name, tensor) for name, tensor in towers.state_dict().items()}


def plain_weight(name: str, tensor: Tensor) -> Tensor:
    """One tensor as plain open_clip stores it; see open_clip_weights."""
    tensor = tensor.detach().to("cpu", copy=True)  # a snapshot: training goes on in the original
    return tensor.reshape(()) if name in ("logit_scale", "logit_bias") else tensor.contiguous()


def load_open_clip_weights(towers: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights that plain open_clip stored. Raises CheckpointError naming what does not fit."""
    own = towers.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{source}: weights do not fit the model; missing {missing[:3]}, unknown {unknown[:3]}: "
            "is it another architecture?"
        )
    shaped = {
        name: weights[name].reshape(own[name].shape) if weights[name].numel() == 1 else weights[name]
        for name in own
    }
    for name, tensor in shaped.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, "
                f"the model wants {tuple(own[name].shape)}: is it another architecture or image size?"
            )
    towers.load_state_dict(shaped)


def _pretrained(config: ModelConfig, record: ModelRecord) -> tuple[ModelRecord, dict[str, Tensor]]:
    """Weights named by `model.pretrained`, with the preprocessing that belongs to them."""
    assert config.pretrained is not None
    where = Path(config.pretrained)
    if where.is_dir():
        loaded = open_clip.create_model(f"local-dir:{where}")
    elif config.name is not None:
        loaded = named_pretrained(config.name, config.pretrained, key="model.pretrained")
    elif where.is_file():
        state = load_state_dict(str(where), device="cpu", weights_only=True)
        return record, cast(dict[str, Tensor], state)
    else:
        raise ConfigError(
            f"model.pretrained = {config.pretrained!r}: neither a weights file nor an exported folder"
        )
    preprocess_cfg = open_clip.get_model_preprocess_cfg(loaded)
    return record_of_tables(record.model_cfg, preprocess_cfg), loaded.state_dict()


def named_pretrained(name: str, pretrained: str, *, key: str = "pretrained") -> nn.Module:
    """open_clip's model of an architecture with a tag or a weights file. key: what messages call it. Raises
    ConfigError for an unknown one, and where a tag's weights cannot be downloaded."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    is_file = Path(pretrained).is_file()
    if not is_file and pretrained not in tags:
        raise ConfigError(
            f"{key} = {pretrained!r}: no such file and no tag of {name}; "
            f"its tags: {', '.join(tags) or 'none'}"
        )
    if pretrained in tags:  # as open_clip decides: a tag goes before a file of its name
        _download(name, pretrained, key=key)
    try:
        return cast(nn.Module, open_clip.create_model(name, pretrained=pretrained))
    except _UNUSABLE_WEIGHTS as error:
        if not is_file:
            raise  # a tag: what failed is not the user's file
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{key} = {pretrained!r}: not the weights of a {name}, or damaged ({reason:.120}); "
            "name a whole .safetensors or .pt file of this architecture"
        ) from error


def _download(name: str, tag: str, *, key: str) -> None:
    """Have a tag's weights in open_clip's cache. Raises ConfigError."""
    muted = logging.root.manager.disable
    logging.disable(logging.ERROR)  # the hub logs each of its tries at length: one error tells of them all
    try:
        open_clip.download_pretrained(open_clip.get_pretrained_cfg(name.replace("/", "-"), tag))
    except (OSError, RuntimeError, HTTPException) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{key} = {tag!r}: its weights cannot be downloaded ({reason:.200}); where there is no network, "
            f"name a downloaded weights file: {key}=FILE"
        ) from error
    finally:
        logging.disable(muted)


_UNUSABLE_WEIGHTS = (
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    AssertionError,
    KeyError,
)
"""What open_clip's reading of a weights file ends with when the file is cut, no weights or another
architecture's."""


def _lock_text(towers: nn.Module) -> None:
    """Freeze the whole text tower, embeddings and projection too; open_clip's own lock needs a Hugging Face
    tower."""
    for name, parameter in towers.named_parameters():
        if not name.startswith("visual.") and name not in ("logit_scale", "logit_bias"):
            parameter.requires_grad_(False)


def block_stacks(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """The towers' stacks of transformer blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and name.endswith(("resblocks", "blocks"))
    }
