"""Every table of a recipe as a frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clipstack.config.objectives import ClipObjective, ObjectiveConfig

Area = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Hue = Annotated[float, Field(ge=0, le=0.5)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunConfig(Frozen):
    dir: Path = Path("runs/run")
    """The run folder itself: everything that a run writes lies in it."""


class ModelConfig(Frozen):
    """Which towers. Either `name`, any open_clip architecture, or the three tables of an open_clip config.

    In a recipe, `model = "ViT-B-32"` is short for `model = {name = "ViT-B-32"}`.
    """

    name: str | None = None
    """An open_clip architecture, such as "ViT-B-32"."""
    embed_dim: int | None = Field(default=None, gt=0)
    """Width of the joint embedding, for a model written as tables."""
    vision_cfg: dict[str, Any] | None = None
    """open_clip's vision tower table: image_size, patch_size, width, layers, ... or timm_model_name."""
    text_cfg: dict[str, Any] | None = None
    """open_clip's text tower table: context_length, vocab_size, width, heads, layers, ..."""
    quick_gelu: bool = False
    """QuickGELU instead of GELU: what OpenAI's weights were trained with."""
    pretrained: str | None = None
    """Weights to start from: an open_clip tag, a weights file, or a folder that `clipstack export` wrote."""
    init_logit_scale: float = Field(default=2.6592600369327783, gt=-10, lt=10)
    """Log of the initial scale; the default is ln(1/0.07)."""
    max_logit_scale: float = Field(default=4.605170185988092, gt=-10, lt=10)
    """Upper bound of the log scale, held in the forward pass; the default is ln 100."""
    lock_image: bool = False
    """Keep the image tower as it is (LiT)."""
    lock_text: bool = False
    """Keep the text tower as it is."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the towers."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _name_or_tables(self) -> ModelConfig:
        tables = (self.embed_dim, self.vision_cfg, self.text_cfg)
        if self.name is None and any(table is None for table in tables):
            raise ValueError('give name, such as "ViT-B-32", or all of embed_dim, vision_cfg and text_cfg')
        if self.name is not None and any(table is not None for table in tables):
            raise ValueError("give either name or embed_dim, vision_cfg and text_cfg, not both")
        return self


class AugmentConfig(Frozen):
    """What training does to an image, each draw keyed by (seed, epoch, sample)."""

    crop_scale: tuple[Area, Area] = (0.9, 1.0)
    """Share of the image's area that a random crop keeps: least and most."""
    crop_ratio: tuple[Positive, Positive] = (0.75, 1.3333333333333333)
    """Width by height of a random crop: least and most."""
    hflip: bool = False
    """Mirror half of the images. Off by default, since captions may name left and right."""
    color_jitter: tuple[Strength, Strength, Strength, Hue] | None = None
    """Strength of random brightness, contrast, saturation (>= 0) and hue (0 to 0.5) changes; none: off."""
    color_jitter_prob: float = Field(default=0.8, ge=0, le=1)
    """Share of images that color_jitter changes."""
    gray_prob: float = Field(default=0.0, ge=0, le=1)
    """Share of images turned to grey."""
    rand_augment: int = Field(default=0, ge=0)
    """Number of RandAugment operations on each image."""
    rand_augment_magnitude: int = Field(default=9, ge=0, le=30)
    """Strength of each RandAugment operation, 0 to 30."""

    @model_validator(mode="after")
    def _least_before_most(self) -> AugmentConfig:
        for key in ("crop_scale", "crop_ratio"):
            least, most = getattr(self, key)
            if least > most:
                raise ValueError(f"{key} = [{least:g}, {most:g}]: give the smaller number first")
        return self


class SourceConfig(Frozen):
    """One of several data sources."""

    path: str
    """Shards: a file, a folder, a brace pattern, a glob or a URL."""
    weight: float = Field(default=1.0, gt=0)
    """Share of samples drawn from this source, relative to the other weights."""


class DataConfig(Frozen):
    train: str | tuple[str, ...] | tuple[SourceConfig, ...]
    """Training shards: a file, folder, brace pattern, glob or URL; a list of them; or a list of {path,
    weight}."""
    val: str | tuple[str, ...] | None = None
    """Validation shards, in the same forms."""
    workers: int = Field(default=2, ge=0)
    """Loader processes a rank; 0 loads in the training process. The data are the same for any number."""
    caption: str = "txt"
    """Where a caption lies: a member's ending ("txt") or a field of KEY.json."""
    lanes: int = Field(default=4, gt=0)
    """Equal parts that an epoch is cut into and read side by side."""
    window_shards: int = Field(default=4, gt=0)
    """Shards of a lane whose samples are permuted together: more mixes better and keeps more shards open."""
    quantum: int = Field(default=1, gt=0)
    """Samples taken from one lane before the next has its turn."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of unusable samples above which the run stops; below it they are replaced and quarantined."""
    max_image_pixels: int = Field(default=50_000_000, gt=0)
    """Images with more pixels than this, by their header, are refused before decoding."""
    allow_pipe: bool = False
    """Allow `pipe:` sources, which run a shell command."""
    cache_dir: Path | None = None
    """Folder for indexes of read-only sources and for shards of remote ones; none: the user's cache
    folder."""
    cache_size_gb: float = Field(default=50.0, gt=0)
    """Room for cached shards of remote sources, in GB (10^9 bytes)."""
    removals: Path | None = None
    """File of samples that must not be used: lines sha256:HEX, key:SHARD/KEY or url:URL."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes to training images."""

    @property
    def sources(self) -> list[tuple[tuple[str, ...], float]]:
        """(paths, weight) of each source of `train`; paths without weights are one source."""
        given = (self.train,) if isinstance(self.train, str) else self.train
        weighted = [one for one in given if isinstance(one, SourceConfig)]
        return [((one.path,), one.weight) for one in weighted] or [(tuple(map(str, given)), 1.0)]

    @property
    def val_paths(self) -> tuple[str, ...]:
        """Of `val`; () where there is none."""
        given = self.val or ()
        return (given,) if isinstance(given, str) else given


class TrainConfig(Frozen):
    steps: int = Field(gt=0)
    """Optimizer steps of the whole run."""
    batch_size: int = Field(gt=1)
    """Image-text pairs a step, over all ranks."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Pairs a device encodes at once; none: the rank's whole share of the batch."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast with fp32 parameters; auto takes bf16 where it is measured to be faster."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: nothing, optimizer state, + gradients, + parameters."""
    collective_timeout_s: float = Field(default=600.0, gt=0)
    """How long a rank waits for the others, in seconds, before it ends with an error."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, exported beside the model; none: off."""


class OptimConfig(Frozen):
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate that the schedule falls to."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of train.steps in which the learning rate rises from zero."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """AdamW's decay of the first and second moment."""
    eps: float = Field(default=1e-6, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.2, ge=0)
    """AdamW's decoupled weight decay; gains, biases, embeddings of position and logit_scale get none."""
    grad_clip_norm: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0: no clipping."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the learning rate for each layer further from the output."""


class CheckpointConfig(Frozen):
    every_steps: int | None = Field(default=None, gt=0)
    """Save each time this many steps are done; none: not by steps."""
    every_minutes: float = Field(default=30.0, ge=0)
    """Save when this much time has passed since the last save; 0: not by time."""
    keep_last: int = Field(default=2, gt=0)
    """How many of the newest checkpoints stay."""
    keep_every_steps: int | None = Field(default=None, gt=0)
    """Checkpoints at multiples of this stay for good."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """What a save that fails (no space, no permission) means for the run."""


class EvalConfig(Frozen):
    every_steps: int | None = Field(default=None, gt=0)
    """Validate each time this many steps are done, and at the end; none: only at the end."""
    classnames: Path | None = None
    """File of class names, one a line; none: `classnames.txt` beside the validation shards, if there is
    one."""
    templates: str = "simple"
    """Prompt templates: a named set or a file with one template a line."""
    batch_size: int = Field(default=128, gt=0)
    """Images a device encodes at once in validation."""
    best_metric: str | None = None
    """A metric of eval.jsonl; the checkpoint with its best value is kept."""


class LogConfig(Frozen):
    every_steps: int = Field(default=10, gt=0)
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra: tensorboard)."""
    wandb: str | None = None
    """Project name for Weights & Biases (extra: wandb); none: off."""


class GuardConfig(Frozen):
    """What training does when it diverges."""

    max_skips: int = Field(default=10, ge=0)
    """Steps in a row with a non-finite loss or gradient, each skipped on all ranks, before a roll-back."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Roll-backs to the last sound checkpoint before the run ends with an error."""
    spike_factor: float | None = Field(default=None, gt=1)
    """Roll back where the loss exceeds this many times its running median; none: off."""


class Recipe(Frozen):
    """A whole training run."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Decides the weights at the start, the order of the data, every augmentation and dropout."""
    run: RunConfig = RunConfig()
    model: ModelConfig
    objective: ObjectiveConfig = ClipObjective()
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _one_view(self) -> Recipe:
        if self.objective.image_image is not None:
            raise ValueError(
                "objective.image_image: the trainer makes one view of each image; drop it, or use the term "
                "in Python, with Embeddings.image_view"
            )
        return self
