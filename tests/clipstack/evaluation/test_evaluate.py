"""`clipstack eval` against open_clip on the same shards, on any number of ranks, in every layout of data."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede open_clip)
import open_clip
import pytest
import torch
import webdataset
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor
from torch.nn.functional import normalize

from clipstack.checkpoint import load_model
from clipstack.cli import main
from clipstack.config import parse_recipe
from clipstack.evaluation.data import TreeSamples
from clipstack.training.validation import validate
from clipstack.world import World
from tests.clipstack.evaluation.conftest import COLOURS, MODEL, NUM_SAMPLES, TEMPLATES, png
from tests.clipstack.launching import Zygote


def evaluate(model: Path, data: Path | str, task: str, out: Path, *options: object) -> dict[str, Any]:
    """What `clipstack eval` writes, run in this process."""
    argv = ["eval", "--model", model, "--data", data, "--task", task, "--json", out, "--device", "cpu"]
    assert main([str(word) for word in (*argv, "--workers", 0, *options)]) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    return report


class Peer:
    """open_clip alone: its loader of models, its PIL transform, its classifier; shards by the webdataset
    library."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        shards = str(data / "test" / "{0..2}.tar")
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
        images = torch.stack([transform(sample["png"].convert("RGB")) for sample in samples])
        self.labels = torch.tensor([sample["cls"] for sample in samples])
        self.captions = [sample["txt"].splitlines() for sample in samples]
        with torch.no_grad():
            self.images = normalize(self.model.encode_image(images), dim=-1)

    @torch.no_grad()
    def classify(self) -> Tensor:
        templates = [template.replace("{c}", "{}") for template in TEMPLATES]
        matrix = open_clip.build_zero_shot_classifier(self.model, self.tokenizer, list(COLOURS), templates)
        return 100.0 * self.images @ matrix

    @torch.no_grad()
    def recalls(self, k: int) -> tuple[float, float]:
        """(image to text, text to image), by the whole matrix."""
        texts = self.tokenizer([text for texts in self.captions for text in texts])
        owner = torch.tensor([row for row, texts in enumerate(self.captions) for _ in texts])
        scores = normalize(self.model.encode_text(texts), dim=-1) @ self.images.T  # (texts, images)
        positive = owner[:, None] == torch.arange(len(self.images))
        by_image = positive.T.gather(1, scores.T.topk(k, dim=1).indices).any(dim=1)
        by_text = positive.gather(1, scores.topk(k, dim=1).indices).any(dim=1)
        return float(by_image.double().mean()), float(by_text.double().mean())


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_numbers_equal_open_clips_on_the_same_shards(
    kind: str, model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path
) -> None:
    peer = Peer(model_folders[kind], benchmark_folder)
    logits = peer.classify()
    ours = evaluate(model_folders[kind], benchmark_folder, "zeroshot", tmp_path / "z.json")
    assert ours["n"] == NUM_SAMPLES
    for k in (1, 5):
        hits = (logits.topk(k, dim=1).indices == peer.labels[:, None]).any(dim=1)
        assert ours[f"top{k}"] == float(hits.double().mean())
    recall = balanced_accuracy_score(peer.labels, logits.argmax(dim=1))
    assert ours["mean_per_class_recall"] == pytest.approx(recall, abs=1e-6)
    if kind == "trained":
        assert 0.4 < ours["top1"] < 1  # else equality shows little
    ours = evaluate(model_folders[kind], benchmark_folder, "retrieval", tmp_path / "r.json")
    for k in (1, 5, 10):
        assert (ours[f"image_to_text_r{k}"], ours[f"text_to_image_r{k}"]) == peer.recalls(k)


def test_reports_are_equal_on_any_number_of_ranks(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path, zygote: Zygote
) -> None:
    for task in ("zeroshot", "retrieval"):
        told = [
            "--model",
            model_folders["trained"],
            "--data",
            benchmark_folder,
            "--task",
            task,
            "--batch-size",
            16,
        ]
        outputs = []
        for ranks in (1, 2, 3):
            out = tmp_path / f"{task}-{ranks}.json"
            words = ["eval", *told, "--device", "cpu", "--workers", 0, "--json", out]
            ended = zygote.run("clipstack.cli:main", words, ranks=ranks)
            assert ended.codes == [0] * ranks, ended.text
            outputs.append(out.read_text())
        assert outputs[0] == outputs[1] == outputs[2]


def unpacked(benchmark_folder: Path, out: Path) -> Path:
    """The same samples as a tree CLASS/IMAGE."""
    for number in range(NUM_SAMPLES):
        folder = out / f"{number % 6}_{list(COLOURS)[number % 6]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03}.png").write_bytes(png(number))
    return out


def test_every_layout_gives_the_same_numbers(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path
) -> None:
    own = ("--templates", benchmark_folder / "zeroshot_classification_templates.txt")
    names = ("--classnames", benchmark_folder / "classnames.txt")
    layouts = {
        "benchmark": (benchmark_folder, ()),
        "folder": (benchmark_folder / "test", own),
        "braces": (f"{benchmark_folder}/test/{{0..2}}.tar", (*own, *names)),
        "tree": (unpacked(benchmark_folder, tmp_path / "tree"), (*own, *names)),
    }
    reports = {
        name: evaluate(model_folders["trained"], path, "zeroshot", tmp_path / f"{name}.json", *options)
        for name, (path, options) in layouts.items()
    }
    for name, report in reports.items():
        for metric in ("n", "top1", "top5", "mean_per_class_recall"):
            assert report[metric] == reports["benchmark"][metric], name
        assert report["ece"] == pytest.approx(reports["benchmark"]["ece"], abs=1e-6)


def test_validation_in_training_uses_the_same_code(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path
) -> None:
    loaded = load_model(model_folders["trained"])
    recipe = parse_recipe(
        {
            "model": MODEL,
            "data": {"train": "x", "val": str(benchmark_folder / "test"), "workers": 0},
            "train": {"steps": 1, "batch_size": 16},
            "eval": {"templates": str(benchmark_folder / "zeroshot_classification_templates.txt")},
        }
    )
    values = validate(loaded.model, loaded.preprocess, recipe, World())
    for task in ("zeroshot", "retrieval"):
        report = evaluate(model_folders["trained"], benchmark_folder, task, tmp_path / f"{task}.json")
        for name in set(values) & set(report):
            assert values[name] == pytest.approx(report[name], abs=1e-9), name
        assert {"top1", "ece"} <= set(values) if task == "zeroshot" else {"image_to_text_r1"} <= set(values)
    assert 0 < values["clip_loss"] < 10 and values["bad_samples"] == 0


def test_the_page_stands_alone(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path
) -> None:
    for task in ("zeroshot", "retrieval"):
        page = tmp_path / f"{task}.html"
        evaluate(model_folders["trained"], benchmark_folder, task, tmp_path / "x.json", "--html", page)
        text = page.read_text()
        assert text.count("data:image/jpeg;base64,") >= 9  # of the best, and at least one of the worst
        assert "<script" not in text and "http" not in text and "Worst examples" in text
        assert ("Reliability" in text) == ("Confusion" in text) == (task == "zeroshot")


def damaged(benchmark_folder: Path, out: Path) -> Path:
    """The data set with an empty shard, one that is no tar, and a handful of bad samples."""
    (out / "test").mkdir(parents=True)
    for file in ("0.tar", "1.tar", "2.tar"):
        (out / "test" / file).write_bytes((benchmark_folder / "test" / file).read_bytes())
    (out / "classnames.txt").write_text("\n".join(COLOURS))
    with tarfile.open(out / "test" / "3.tar", "w"):
        pass
    (out / "test" / "4.tar").write_bytes(b"")
    from data_pipelines.index import Sample, write_shard

    write_shard(
        out / "test" / "5.tar",
        [
            Sample("a", {"png": png(0)[:200], "cls": b"0", "txt": b"cut off"}),
            Sample("b", {"png": png(1), "cls": b"17", "txt": b"label out of range"}),
            Sample("c", {"png": png(2), "txt": b"no class"}),
            Sample("d", {"png": png(3), "cls": b"3", "txt": b"caf\xe9 in latin-1"}),
            Sample("e", {"png": png(4), "cls": b"four", "txt": b"class is no number"}),
            Sample("f", {"png": png(5), "cls": b"5", "txt": b"sound"}),
            Sample("g", {"png": png(6), "cls": b"9" * 30, "txt": b"class is beyond any integer type"}),
        ],
    )
    return out


def test_what_is_damaged_is_counted_and_left_out(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = damaged(benchmark_folder, tmp_path / "data")
    report = evaluate(model_folders["random"], data, "zeroshot", tmp_path / "z.json")
    skipped = report["skipped"]
    counts = {name: value for name, value in skipped.items() if name != "examples" and value}
    assert counts == {
        "bad_samples": 3,
        "without_class": 1,
        "labels_out_of_range": 1,
        "empty_shards": 1,
        "unreadable_shards": 1,
    }
    assert report["n"] == NUM_SAMPLES + 2
    reasons = {example["key"]: example["reason"] for example in skipped["examples"]}
    assert "9999" in reasons["g"]
    assert "four" in reasons["e"] and "decoded" in reasons["a"] and "4.tar" in reasons[None]
    assert "skipped: labels_out_of_range" in capsys.readouterr().out
    report = evaluate(model_folders["random"], data, "retrieval", tmp_path / "r.json")
    reasons = {example["key"]: example["reason"] for example in report["skipped"]["examples"]}
    assert "not UTF-8" in reasons["d"]
    assert report["n"] == NUM_SAMPLES + 3 and report["skipped"]["bad_samples"] == 4


def test_wrong_input_is_told_in_one_line(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folders["random"]
    bare = tmp_path / "bare"
    (bare / "test").mkdir(parents=True)
    (bare / "test" / "0.tar").write_bytes((benchmark_folder / "test" / "0.tar").read_bytes())
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café {}".encode("latin-1"))
    number = tmp_path / "number.json"
    number.write_text("5")
    flat = tmp_path / "flat.json"
    box = {"bbox_x": 1, "bbox_y": 1, "bbox_w": 0, "bbox_h": 3}
    flat.write_text(json.dumps([{"image": "a.png", "caption": "a", "negatives": ["b"], **box}]))
    short = tmp_path / "short.txt"
    short.write_text("\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    with tarfile.open(empty / "0.tar", "w"):
        pass
    cases = [
        ("zeroshot", bare, (), "give --classnames"),
        ("zeroshot", bare, ("--classnames", latin), "not UTF-8"),
        ("zeroshot", bare, ("--classnames", short), "no class names"),
        ("zeroshot", benchmark_folder, ("--templates", latin), "not UTF-8"),
        ("zeroshot", benchmark_folder, ("--templates", "nowhere.txt"), "no such file"),
        ("zeroshot", benchmark_folder, ("--split", "val"), "--split test"),
        ("zeroshot", tmp_path / "none", (), "no such file or folder"),
        ("retrieval", empty, (), "empty archive"),
        ("probe", benchmark_folder, (), "--train-data"),
        ("probe", benchmark_folder, ("--train-data", benchmark_folder), "itself as the data"),
        ("zeroshot", benchmark_folder, ("--json", latin / "z.json"), "folder cannot be made"),
        ("zeroshot", benchmark_folder, ("--html", empty), "is a folder"),
        ("compositional", number, (), "a list or an object"),
        ("compositional", flat, (), "bbox_w = 0"),
    ]
    (bare / "test" / "nshards.txt").write_text("1")
    for task, data, options, expected in cases:
        words = ["eval", "--model", model, "--data", data, "--task", task, "--workers", 0, *options]
        code = main([str(word) for word in words])
        said = capsys.readouterr().err
        assert code == 2 and said.count("\n") == 1 and expected in said, (task, data, options, said)
    (bare / "test" / "nshards.txt").write_text("3")
    assert main(["eval", "--model", str(model), "--data", str(bare), "--task", "zeroshot"]) == 2
    assert "2 are missing, such as 1.tar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--workers", "-1", "0 or more"),
        ("--batch-size", "0", "1 or more"),
        ("--neighbours", "0", "1 or more"),
        ("--inverse-penalty", "-1", "above 0"),
        ("--inverse-penalty", "nan", "above 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "--model", "m", "--data", "d", "--task", "probe", option, value])
    said = capsys.readouterr().err
    assert option in said and expected in said


def test_probes_on_frozen_features_equal_scikit_learns(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    tree = tmp_path / "train"
    for number in range(200, 290):
        folder = tree / f"{number % 6}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(number))
    options = ("--train-data", tree, "--neighbours", 5, "--inverse-penalty", 10)
    report = evaluate(model_folders["trained"], benchmark_folder, "probe", tmp_path / "p.json", *options)
    loaded = load_model(model_folders["trained"])

    def features(numbers: range) -> Any:
        images = [Image.open(png_file(tmp_path, i)).convert("RGB") for i in numbers]
        with torch.no_grad():
            return loaded.model.encode_image(
                torch.stack([loaded.preprocess.eval_image(i) for i in images])
            ).numpy()

    train, test = range(200, 290), range(NUM_SAMPLES)
    labels = [i % 6 for i in train], [i % 6 for i in test]
    linear = LogisticRegression(C=10, max_iter=1000).fit(features(train), labels[0])
    nearest = KNeighborsClassifier(5, metric="cosine").fit(features(train), labels[0])
    assert report["linear_probe_top1"] == pytest.approx(linear.score(features(test), labels[1]), abs=0.011)
    assert report["knn_top1"] == pytest.approx(nearest.score(features(test), labels[1]), abs=0.011)
    assert report["linear_probe_top1"] > 0.4


def test_a_probe_matches_the_classes_of_two_trees_by_name(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = tmp_path / "train", tmp_path / "test"
    for number in range(12):
        for tree in (train, test) if number % 3 else (train,):  # the test data lack the first class
            (tree / "abc"[number % 3]).mkdir(parents=True, exist_ok=True)
            (tree / "abc"[number % 3] / f"{number}.png").write_bytes(png(number))
    for name in ("a", ".git", "empty"):
        (test / name).mkdir()
    (test / ".git" / "x.png").write_bytes(png(0))
    assert TreeSamples(test).classes == ("b", "c")
    options = ("--train-data", train, "--neighbours", 1)
    report = evaluate(model_folders["trained"], test, "probe", tmp_path / "p.json", *options)
    assert report["knn_top1"] == 1, "each image is its own neighbour"
    (test / "d").mkdir()
    (test / "d" / "x.png").write_bytes(png(0))
    words = ["eval", "--model", model_folders["trained"], "--data", test, "--task", "probe"]
    assert main([str(word) for word in (*words, "--train-data", train, "--device", "cpu")]) == 2
    assert "lacks, such as 'd'" in capsys.readouterr().err


def png_file(folder: Path, number: int) -> Path:
    path = folder / f"png-{number}.png"
    path.write_bytes(png(number))
    return path


def test_compositional_probes_read_all_three_layouts_alike(
    model_folders: dict[str, Path], tmp_path: Path, zygote: Zygote
) -> None:
    names = list(COLOURS)
    images = tmp_path / "images"
    images.mkdir()
    jsonl, crepe, aro = [], {}, []
    for i in range(24):
        (images / f"{i}.png").write_bytes(png(i))
        own, other = f"a photo of a {names[i % 6]} thing.", f"a photo of a {names[(i + 1) % 6]} thing."
        jsonl.append(json.dumps({"image": f"{i}.png", "caption": own, "negatives": [other]}))
        crepe[str(i)] = {"filename": f"{i}.png", "caption": own, "negative_caption": other}
        aro.append(
            {"image_path": f"{i}.png", "true_caption": own, "false_caption": other, "relation_name": "on"}
        )
    jsonl.append(json.dumps({"image": "missing.png", "caption": "a", "negatives": ["b"]}))
    (tmp_path / "ours.jsonl").write_text("\n".join(jsonl))
    (tmp_path / "swap_att.json").write_text(json.dumps(crepe))
    (tmp_path / "vg.json").write_text(json.dumps(aro))
    model, accuracies = model_folders["trained"], []
    loaded = load_model(model)
    for file in ("ours.jsonl", "swap_att.json", "vg.json"):
        out = tmp_path / f"{file}.out"
        report = evaluate(model, tmp_path / file, "compositional", out, "--images", images)
        assert report["n"] == 24 and report["skipped"]["bad_samples"] == (file == "ours.jsonl")
        accuracies.append(report["accuracy"])
    with torch.no_grad():
        pixels = torch.stack(
            [loaded.preprocess.eval_image(Image.open(images / f"{i}.png")) for i in range(24)]
        )
        vectors = loaded.model.encode_image(pixels)
        own = loaded.model.encode_text(loaded.tokenizer([crepe[str(i)]["caption"] for i in range(24)]))
        other = loaded.model.encode_text(
            loaded.tokenizer([crepe[str(i)]["negative_caption"] for i in range(24)])
        )
    expected = float(((vectors * own).sum(1) > (vectors * other).sum(1)).double().mean())
    assert accuracies == [expected] * 3 and expected > 0.5
    words = [
        "eval",
        "--model",
        model,
        "--data",
        tmp_path / "ours.jsonl",
        "--task",
        "compositional",
        "--workers",
        0,
    ]
    words += ["--images", images, "--batch-size", 5, "--device", "cpu", "--json", tmp_path / "two.json"]
    assert zygote.run("clipstack.cli:main", words).codes == [0, 0]
    assert json.loads((tmp_path / "two.json").read_text())["accuracy"] == expected
