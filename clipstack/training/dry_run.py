"""`--dry-run`: the first batch as a picture, the model's size, the memory it will take, and what would
run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image, ImageDraw
from torch import Tensor

from clipstack.config import Recipe
from clipstack.loading.train_loader import Batch, TrainLoader
from clipstack.model import ClipModel
from clipstack.preprocess import Preprocess
from clipstack.training.deepspeed_config import deepspeed_config
from clipstack.world import World

SHOWN = 32
CELL_PX, TEXT_PX, COLUMNS = 128, 28, 8
GIB = 2**30


@dataclass(frozen=True)
class _Measuring(Preprocess):
    """The same, but each row of tokens ends in one number more: 1 where the caption was cut, else 0."""

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """(N,) texts -> (N, context_length + 1) int64."""
        tokens = super().tokenize(captions)  # (N, context_length)
        cut = is_cut(tokens, self._roomy.tokenize(captions))
        return torch.cat([tokens, cut[:, None].long()], dim=1)

    @cached_property
    def _roomy(self) -> Preprocess:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Preprocess(**{**fields, "context_length": self.context_length + 1})


def is_cut(tokens: Tensor, longer: Tensor) -> Tensor:
    """(N,) bool: which captions did not fit. tokens: (N, L), longer: (N, L + 1), of the same captions.

    Given room for one more, a caption that fits gets padding after the same tokens; one that does not gets a
    word where its end stood.
    """
    return (longer[:, :-1] != tokens).any(dim=1)


def cut_captions(cut: Tensor, context_length: int) -> str:
    """A line on the share of captions that are cut. cut: (N,), not 0 where one is."""
    share = f"{int(cut.count_nonzero())} of {len(cut)} in the first batch"
    return f"cut captions     {share} are longer than model.text_cfg.context_length = {context_length} tokens"


def dry_run(recipe: Recipe, model: ClipModel, world: World, user_config: Mapping[str, Any]) -> int:
    """Print what would run, and write RUN/dry-run.png; trains nothing. Returns the exit code."""
    assert recipe.train.precision != "auto"
    config = deepspeed_config(
        recipe, world_size=world.size, precision=recipe.train.precision, user_config=user_config
    )
    preprocess = _Measuring.from_record(model.record, augment=recipe.data.augment)
    loader = TrainLoader(
        recipe.data, preprocess=preprocess, batch_size=recipe.train.batch_size, world=world, seed=recipe.seed,
        quarantine_path=None,
    )  # fmt: skip
    try:
        batch = next(iter(loader.iterate(0)))
        if world.is_main:
            recipe.run.dir.mkdir(parents=True, exist_ok=True)
            picture = recipe.run.dir / "dry-run.png"
            draw_batch(batch, preprocess).save(picture)
            print(
                "\n".join(
                    describe(
                        recipe, model, world, int(config["zero_optimization"]["stage"]), loader.num_samples
                    )
                )
            )
            print(f"first batch      {picture}")
            print(cut_captions(batch.tokens[:, -1], preprocess.context_length), flush=True)
    finally:
        loader.close()
        sys.stdout.flush()
    return 0


def describe(recipe: Recipe, model: ClipModel, world: World, zero_stage: int, num_samples: int) -> list[str]:
    """What would run, in lines."""
    counts = {"image": 0, "text": 0}
    for name, parameter in model.towers.named_parameters():
        counts["image" if name.startswith("visual.") else "text"] += parameter.numel()
    total = sum(counts.values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    epochs = recipe.train.steps * recipe.train.batch_size / num_samples
    return [
        f"run folder       {recipe.run.dir}",
        f"parameters       {total:,} (image tower {counts['image']:,}, text tower {counts['text']:,}; "
        f"{trained:,} train)",
        f"objective        {recipe.objective.name}",
        f"data             {num_samples:,} samples; {recipe.train.steps:,} steps of "
        f"{recipe.train.batch_size} = {epochs:.2f} epochs",
        f"ranks            {world.size} on {world.device.type}, {recipe.train.batch_size // world.size} "
        "pairs each a step",
        f"precision        {recipe.train.precision}",
        f"ZeRO stage       {zero_stage}",
        f"memory a rank    {state_bytes(total, trained, zero_stage, world.size) / GIB:.2f} GiB of weights, "
        "gradients and optimizer "
        "state, without activations",
    ]


def state_bytes(total: int, trained: int, zero_stage: int, world_size: int) -> int:
    """Bytes a rank for weights (4 each), gradients (4) and AdamW's master copy and moments (12; 8 at stage
    0)."""
    weights = 4 * total // (world_size if zero_stage == 3 else 1)
    gradients = 4 * trained // (world_size if zero_stage >= 2 else 1)
    optimizer = 8 * trained if zero_stage == 0 else 12 * trained // world_size
    return weights + gradients + optimizer


def draw_batch(batch: Batch, preprocess: Preprocess) -> Image.Image:
    """The first images of a batch with their captions below, as the model will get them."""
    shown = min(SHOWN, len(batch.keys))
    rows = -(-shown // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL_PX, rows * (CELL_PX + TEXT_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    tokens = batch.tokens[:, : preprocess.context_length]
    for i in range(shown):
        x, y = i % COLUMNS * CELL_PX, i // COLUMNS * (CELL_PX + TEXT_PX)
        pixels = batch.images[i].permute(1, 2, 0).contiguous().to(torch.uint8).numpy()
        sheet.paste(Image.fromarray(pixels).resize((CELL_PX - 4, CELL_PX - 4)), (x + 2, y + 2))
        for line, part in enumerate(_wrap(decoded(preprocess.tokenizer, tokens[i].tolist()))):
            pen.text((x + 3, y + CELL_PX + 12 * line), part, fill="black")
    return sheet


def decoded(tokenizer: SimpleTokenizer | HFTokenizer, tokens: list[int]) -> str:
    """The text of one row of tokens, without what marks its ends and fills it up."""
    if isinstance(tokenizer, HFTokenizer):
        text: str = tokenizer.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()
    whole: str = tokenizer.decode([token for token in tokens if token])
    return whole.replace("<start_of_text>", "").split("<end_of_text>")[0].strip()


def _wrap(text: str, width: int = 21, lines: int = 2) -> list[str]:
    parts = [text[i : i + width] for i in range(0, len(text), width)]
    return parts[:lines]
