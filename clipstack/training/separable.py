"""Whether a model's features of a sample are its own: micro-batches are exact for no other model."""

from __future__ import annotations

from collections.abc import Iterator

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede open_clip)
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import Attention
from timm.layers.drop import DropBlock2d, DropPath
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops.misc import FrozenBatchNorm2d

from clipstack.errors import ConfigError

_HUGGING_FACE_DROPOUTS = (
    "attention_probs_dropout_prob", "attention_dropout", "activation_dropout", "dropout", "dropout_rate",
)  # fmt: skip
"""What its towers drop by functions, which no module can be put in the place of."""


def check_separable(model: nn.Module, micro_batch_size: int) -> None:
    """Raises ConfigError where micro-batches would give other features than the whole batch: the module looks
    at other samples, or draws dropout that depends on what was drawn before.

    Call it once dropouts are keyed (`dropout.key_dropouts`).
    """
    for name, module in model.named_modules():
        for problem in _problems(module):
            raise ConfigError(
                f"train.micro_batch_size = {micro_batch_size}: {name.removeprefix('towers.')} "
                f"({type(module).__name__}) {problem}, so micro-batches would not give the gradients of the "
                "whole batch; remove train.micro_batch_size, or choose another tower"
            )


def _problems(module: nn.Module) -> Iterator[str]:
    if uses_batch_statistics(module):
        yield "normalises by the statistics of the samples beside"
    if any(p > 0 for p in _unkeyed(module)):
        yield "drops at random by torch's own generator"


def uses_batch_statistics(module: nn.Module) -> bool:
    """BatchNorm and its kin, where they learn: in evaluation mode they use what they have learned."""
    if isinstance(module, FrozenBatchNorm2d | FrozenBatchNormAct2d):
        return False
    has_statistics = any(name == "running_var" for name, _ in module.named_buffers(recurse=False))
    return module.training and (has_statistics or isinstance(module, _BatchNorm))


def _unkeyed(module: nn.Module) -> list[float]:
    """Probabilities of the dropouts that a module draws by itself."""
    match module:
        case _DropoutNd():
            return [module.p]
        case DropPath() | DropBlock2d():
            return [module.drop_prob]
        case nn.MultiheadAttention() | nn.RNNBase():
            return [module.dropout]
        case Attention():  # its fused attention drops by itself
            return [module.attn_drop.p]
        case HFTextEncoder():
            return [getattr(module.config, name, 0.0) or 0.0 for name in _HUGGING_FACE_DROPOUTS]
    return []
