"""What `clipstack export` writes: open_clip alone gives the same features, so does onnxruntime, and the cards
tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from clipstack.checkpoint import load_model  # isort: skip  (has to precede open_clip)
import open_clip

from clipstack.cli import main
from clipstack.templates import load_templates
from clipstack.zero_shot import classifier

REPOSITORY = Path(__file__).resolve().parents[3]

ALONE = """
import importlib.abc, sys

class NoClipstack(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("clipstack", "data_pipelines", "serve"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, NoClipstack())
import torch
try:
    import torchvision
except RuntimeError:
    # A CUDA torchvision beside a CPU torch: its users must name the operators that it misses.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
import open_clip
folder, inputs, out = sys.argv[1:]
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
model.eval()
images, texts = torch.load(inputs)
tokens = open_clip.get_tokenizer("local-dir:" + folder)(texts)
with torch.no_grad():
    torch.save((model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True),
    tokens), out)
assert "clipstack" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", "--model", str(model_folders["trained"]), "--output", str(out), "--onnx"]) == 0
    return out


def inputs(exported: Path) -> tuple[torch.Tensor, list[str]]:
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return images, ["red", "a photo of a blue thing.", "", "x " * 60, "the colour white"]


def test_open_clip_alone_gives_the_same_features(exported: Path, tmp_path: Path) -> None:
    images, texts = inputs(exported)
    torch.save((images, texts), tmp_path / "in.pt")
    words = [sys.executable, "-c", ALONE, str(exported), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = load_model(exported)
    image, text, tokens = torch.load(tmp_path / "out.pt")
    assert (tokens == loaded.tokenizer(texts)).all()
    with torch.no_grad():
        assert (image - loaded.model.encode_image(images)).abs().max() <= 1e-6
        assert (text - loaded.model.encode_text(tokens)).abs().max() <= 1e-6


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_onnx_gives_the_same_features(exported: Path, batch: int) -> None:
    loaded = load_model(exported)
    images, texts = inputs(exported)
    tokens = loaded.tokenizer(texts)
    told = json.loads((exported / "onnx" / "onnx.json").read_text())
    with torch.no_grad():
        expected = loaded.model.encode_image(images), loaded.model.encode_text(tokens)
    for part, given, reference in zip(("image", "text"), (images, tokens), expected, strict=True):
        session = onnxruntime.InferenceSession(str(exported / "onnx" / told[part]["file"]))
        (vectors,) = session.run([told[part]["output"]], {told[part]["input"]: given[:batch].numpy()})
        cosine = (vectors * reference[:batch].numpy()).sum(axis=1)
        assert vectors.shape == (batch, 16) and cosine.min() >= 0.99999
    assert told["logit_scale"] == pytest.approx(float(loaded.model.bounded_logit_scale().exp()))


def test_weights_and_fingerprint_survive(exported: Path, model_folders: dict[str, Path]) -> None:
    assert load_model(exported).fingerprint == load_model(model_folders["trained"]).fingerprint
    assert (
        json.loads((exported / "clipstack.json").read_text())["fingerprint"]
        == load_model(exported).fingerprint
    )


def test_an_evaluation_enters_the_cards_of_its_own_model_only(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, told = tmp_path / "model", tmp_path / "e.json"
    words = ["--data", str(benchmark_folder), "--task", "zeroshot", "--workers", "0", "--json", str(told)]
    assert main(["eval", "--model", str(model_folders["trained"]), *words]) == 0
    export = ["--output", str(out), "--evaluation", str(told)]
    capsys.readouterr()
    assert main(["export", "--model", str(model_folders["trained"]), *export]) == 0
    printed = capsys.readouterr().out.splitlines()
    names: dict[str, Any] = {"open_clip": open_clip}
    exec(printed[1], names)  # the line of code that loads it
    assert printed[0] == str(out) and names["model"].visual.output_dim == 16
    top1 = json.loads(told.read_text())["top1"]
    assert f"| top1 | {top1:.4f} |" in (out / "MODEL_CARD.md").read_text()
    assert "Nothing is recorded" in (out / "DATA_CARD.md").read_text()
    capsys.readouterr()
    assert main(["export", "--model", str(model_folders["random"]), *export]) == 2
    assert "--evaluation: of model" in capsys.readouterr().err
    assert main(["export", "--model", str(model_folders["random"]), "--output", str(told)]) == 2
    assert "is a file; name a new or empty folder" in capsys.readouterr().err


def test_whoever_may_read_the_config_may_read_the_weights(exported: Path) -> None:
    assert (exported / "open_clip_model.safetensors").stat().st_mode == (
        exported / "open_clip_config.json"
    ).stat().st_mode


def test_damaged_tables_are_told_in_one_line(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = json.loads((model_folders["random"] / "open_clip_config.json").read_text())
    cases = [
        ({"preprocess_cfg": {}}, {}, "model_cfg must hold"),
        ({"model_cfg": {"embed_dim": 16, "vision_cfg": {}}}, {}, "model_cfg must hold"),
        (tables, {"format": 1, "max_logit_scale": "x"}, "max_logit_scale is 'x'"),
    ]
    for config, about, expected in cases:
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        (tmp_path / "clipstack.json").write_text(json.dumps(about))
        assert main(["eval", "--model", str(tmp_path), "--data", "d", "--task", "zeroshot"]) == 1
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1


@pytest.mark.parametrize("kind", ["of another architecture", "cut", "no weights"])
def test_an_unusable_weights_file_is_told_in_one_line(
    kind: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (exported / "open_clip_model.safetensors").read_bytes()
    content = {"of another architecture": weights, "cut": weights[:100], "no weights": b"x" * 99}[kind]
    file = tmp_path / ("w.pt" if kind == "no weights" else "w.safetensors")
    file.write_bytes(content)
    words = ["--model", "ViT-S-32-alt", "--pretrained", str(file), "--data", "d", "--task", "zeroshot"]
    assert main(["eval", *words]) == 2
    said = capsys.readouterr().err
    assert "not the weights of a ViT-S-32-alt, or damaged" in said and said.count("\n") == 1


def test_templates_can_be_open_clips_own(model_folders: dict[str, Path]) -> None:
    assert len(load_templates("openai")) == 80
    assert all(
        template.count("{}") == 1
        for name in ("single", "simple", "ensemble")
        for template in load_templates(name)
    )
    loaded = load_model(model_folders["random"])
    with torch.no_grad():
        matrix = classifier(loaded.model.encode_text, loaded.tokenizer, ["red"], load_templates("ensemble"))
    assert np.isclose(float(matrix.norm()), 1, atol=1e-6)
