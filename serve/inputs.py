"""What every engine is given: texts as token ids, and pictures of the model's size, made as in training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from clipstack.checkpoint import LoadedModel
from clipstack.preprocess import Preprocess

import numpy as np  # isort: skip
import torch  # isort: skip
from open_clip.tokenizer import SimpleTokenizer  # isort: skip
from PIL import Image  # isort: skip
from torchvision.transforms import InterpolationMode  # isort: skip
from torchvision.transforms.v2 import functional as F  # isort: skip

from serve.bpe import BoundedBpe
from serve.errors import ErrorCode, ServeError
from serve.runtime import ModelInfo, TokenIds, Tokens, UInt8

MAX_ASPECT = 16  # a longer picture loses what the centre crop would cut off anyway, before it is enlarged


class Inputs:
    """The tokenizer and the preprocessing of one model. Its methods may be called from any thread."""

    def __init__(self, loaded: LoadedModel, how: Literal["fast", "exact"]) -> None:
        self.how = how
        blank = torch.zeros((1, loaded.preprocess.context_length), dtype=torch.int64)
        self.can_trim = loaded.model.trim_tokens(blank).shape[1] < loaded.preprocess.context_length
        """Whether token rows may be shorter than the context: nothing reads what stands behind a text."""
        self._tokenize = _tokenize_with(loaded, can_trim=self.can_trim)
        self._sized = _sizer_of(loaded.preprocess, how)

    def tokenize(self, text: str, *, truncate: bool) -> Tokens:
        return self._tokenize(text, truncate)

    def prepare_image(self, pixels: UInt8) -> UInt8:
        use_torch_threads(1)  # images are decoded side by side: one thread each
        return self._sized(_without_extremes(pixels))


_of_thread = threading.local()


def use_torch_threads(num_threads: int) -> None:
    """torch's number of threads belongs to the calling thread; set where it is another."""
    if getattr(_of_thread, "num_threads", 0) != num_threads:
        torch.set_num_threads(num_threads)
        _of_thread.num_threads = num_threads


def padded(texts: Sequence[TokenIds], length: int) -> TokenIds:
    """Token rows -> (N, length) int64, zeros at their ends. length: at least the longest row's."""
    batch = np.zeros((len(texts), length), dtype=np.int64)
    for row, ids in zip(batch, texts, strict=True):
        row[: len(ids)] = ids
    return batch


def info_of(loaded: LoadedModel, *, device: torch.device, engine: str) -> ModelInfo:
    """What is known of a model before its vectors have been compared, in float32."""
    model = loaded.model
    bias = model.towers.logit_bias
    return ModelInfo(
        fingerprint=loaded.fingerprint,
        dimensions=model.embed_dim,
        context_length=loaded.preprocess.context_length,
        image_size=loaded.preprocess.image_size,
        probabilities="softmax" if bias is None else "sigmoid",
        logit_scale=float(model.bounded_logit_scale().float().exp()),
        logit_bias=0.0 if bias is None else float(bias),
        engine=engine,
        device=str(device),
        dtype="float32",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _without_extremes(pixels: UInt8) -> UInt8:
    """Cut a very long picture to the middle that the centre crop looks at: enlarged whole, it could fill the
    memory.
    """
    height, width = pixels.shape[:2]
    longest = MAX_ASPECT * min(height, width)
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return pixels[top : top + longest, left : left + longest]


def _sizer_of(preprocess: Preprocess, how: Literal["fast", "exact"]) -> Callable[[UInt8], UInt8]:
    """(H, W, 3) -> (3, height, width), as the model was trained. Fast exists for what CLIP models use."""
    modes = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
    height, width = preprocess.image_size
    is_common = preprocess.resize_mode == "shortest" and height == width and preprocess.interpolation in modes
    if how == "fast" and is_common:
        return partial(_resize_and_crop, side=height, mode=modes[preprocess.interpolation])
    return partial(_as_trained, preprocess=preprocess)


def _as_trained(pixels: UInt8, *, preprocess: Preprocess) -> UInt8:
    sized: UInt8 = preprocess.eval_pixels(Image.fromarray(pixels)).numpy()
    return sized


def _resize_and_crop(pixels: UInt8, *, side: int, mode: InterpolationMode) -> UInt8:
    """Shorter edge to `side`, centre cropped: open_clip's transform, with torchvision's integer resize for
    Pillow's.
    """
    # Permuted, not copied: the integer resize is fastest on channels-last memory.
    image = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(
        2, 0, 1
    )  # (3, H, W)
    height, width = pixels.shape[:2]
    short = min(height, width)
    size = [int(side * height / short), int(side * width / short)]
    if short != side:
        image = F.resize_image(image, size, interpolation=mode, antialias=True)
    top, left = round((image.shape[1] - side) / 2), round((image.shape[2] - side) / 2)
    sized: UInt8 = image[:, top : top + side, left : left + side].contiguous().numpy()
    return sized


def _tokenize_with(loaded: LoadedModel, *, can_trim: bool) -> Callable[[str, bool], Tokens]:
    """How a text becomes ids, chosen once by the kind of tokenizer that the model came with."""
    context_length = loaded.preprocess.context_length
    if isinstance(loaded.tokenizer, SimpleTokenizer) and loaded.tokenizer.reduction_fn is None:
        return _SimpleTokens(loaded.tokenizer, context_length, can_trim=can_trim)
    return _WrappedTokens(loaded.tokenizer, context_length)


class _SimpleTokens:
    """open_clip's own tokenizer."""

    def __init__(self, tokenizer: Any, context_length: int, *, can_trim: bool) -> None:
        self._bpe = BoundedBpe(tokenizer)
        self._start, self._end = tokenizer.sot_token_id, tokenizer.eot_token_id
        self._context_length = context_length
        self._can_trim = can_trim

    def __call__(self, text: str, truncate: bool) -> Tokens:
        words = self._bpe.encode(text)
        room = self._context_length - 2
        if len(words) > room and not truncate:
            raise too_long(len(words) + 2, self._context_length)
        ids = [self._start, *words[:room], self._end]
        padding = 0 if self._can_trim else self._context_length - len(ids)
        return Tokens(
            np.array(ids + [0] * padding, dtype=np.int64), count=len(ids), was_cut=len(words) > room
        )


class _WrappedTokens:
    """A tokenizer of the Hugging Face library behind open_clip's HFTokenizer: its rows are padded already."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._lock = threading.Lock()  # such a tokenizer keeps its padding and truncation as state

    def __call__(self, text: str, truncate: bool) -> Tokens:
        with self._lock:
            count = len(self._tokenizer.tokenizer(self._tokenizer.clean_fn(text)).input_ids)
            row = self._tokenizer([text])[0]
        if count > self._context_length and not truncate:
            raise too_long(count, self._context_length)
        cut = count > self._context_length
        return Tokens(row.numpy().astype(np.int64), count=min(count, self._context_length), was_cut=cut)


def too_long(count: int, context_length: int) -> ServeError:
    message = f"the text has {count} tokens and the model reads {context_length}"
    message += '; shorten it or send "truncate": true'
    return ServeError(ErrorCode.TEXT_TOO_LONG, message)
