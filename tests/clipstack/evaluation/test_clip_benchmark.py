"""Our numbers against CLIP_benchmark's own code on the same shards.

CLIP_benchmark asks for packages that nothing here needs; `pip install --no-deps clip-benchmark==1.6.2` is
enough.
"""

from __future__ import annotations

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede open_clip)
import json
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import webdataset
from torch.utils.data import DataLoader

from clipstack.cli import main
from tests.clipstack.evaluation.conftest import COLOURS, TEMPLATES

classification = pytest.importorskip(
    "clip_benchmark.metrics.zeroshot_classification", reason="clip-benchmark is not installed"
)
retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")


def theirs(folder: Path, data: Path, task: str) -> dict[str, float]:
    """CLIP_benchmark's evaluate() over its own kind of pipeline, in fp32."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    dataset: Any = webdataset.WebDataset(str(data / "test" / "{0..2}.tar"), shardshuffle=False).decode("pil")
    if task == "zeroshot":
        dataset = dataset.to_tuple("png", "cls").map_tuple(transform, None)
        dataset.classes = list(COLOURS)
        loader = DataLoader(dataset, batch_size=16)
        names, templates = list(COLOURS), list(TEMPLATES)
        matrix = classification.zero_shot_classifier(model, tokenizer, names, templates, "cpu", amp=False)
        logits, labels = classification.run_classification(model, matrix, loader, "cpu", amp=False)
        # Its evaluate() ends with float() of an array with one element, which numpy 2.4 refuses: the same
        # sums here.
        right = logits.topk(5, 1, True, True)[1].t().eq(labels.view(1, -1))
        return {
            "acc1": right[:1].sum().item() / len(labels),
            "acc5": right[:5].sum().item() / len(labels),
            "mean_per_class_recall": classification.balanced_accuracy_score(labels, logits.argmax(axis=1)),
        }
    dataset = dataset.to_tuple("png", "txt").map_tuple(transform, str.splitlines)
    loader = DataLoader(dataset, batch_size=16, collate_fn=_images_and_captions)
    return retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])


def _images_and_captions(rows: list[Any]) -> Any:
    import torch

    images, captions = zip(*rows, strict=True)
    return torch.stack(images), list(captions)


def ours(folder: Path, data: Path, task: str, out: Path) -> dict[str, float]:
    words = ["eval", "--model", folder, "--data", data, "--task", task, "--json", out, "--workers", 0]
    assert main([str(word) for word in words]) == 0
    report: dict[str, float] = json.loads(out.read_text())
    return report


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_zero_shot(kind: str, model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path) -> None:
    peer = theirs(model_folders[kind], benchmark_folder, "zeroshot")
    report = ours(model_folders[kind], benchmark_folder, "zeroshot", tmp_path / "x.json")
    assert report["top1"] == peer["acc1"] and report["top5"] == peer["acc5"]
    assert report["mean_per_class_recall"] == pytest.approx(peer["mean_per_class_recall"], abs=1e-6)


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_retrieval(kind: str, model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = theirs(model_folders[kind], benchmark_folder, "retrieval")
    report = ours(model_folders[kind], benchmark_folder, "retrieval", tmp_path / "x.json")
    # Theirs are means in fp32: counts are equal where the difference is below half a count.
    for k in (1, 5, 10):
        assert report[f"image_to_text_r{k}"] == pytest.approx(peer[f"text_retrieval_recall@{k}"], abs=1e-6)
        assert report[f"text_to_image_r{k}"] == pytest.approx(peer[f"image_retrieval_recall@{k}"], abs=1e-6)
