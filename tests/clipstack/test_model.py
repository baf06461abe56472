"""The model against open_clip's own, its bounded temperature, and weights from elsewhere."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipstack.checkpoint import export_model, load_model
from clipstack.checkpoint.weights import fingerprint_of
from clipstack.config.models import ModelConfig
from clipstack.errors import CheckpointError, ConfigError
from clipstack.model import build_model
from clipstack.towers import named_pretrained, open_clip_weights

import open_clip  # isort: skip  (after clipstack: torchvision may need its stand-in)

TABLES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SMALL = ModelConfig(**TABLES)


def tokens_of(*captions: str) -> torch.Tensor:
    return open_clip.SimpleTokenizer(context_length=12)(list(captions))


def test_features_and_gradients_equal_open_clips_own() -> None:
    model = build_model(SMALL, seed=0).double()
    own = open_clip.CLIP(**TABLES, nonscalar_logit_scale=True).double()
    own.load_state_dict(model.towers.state_dict())
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    tokens = tokens_of("a cat", "two dogs on a mat", "x")
    ours = model(images, model.trim_tokens(tokens))
    image, text, scale = own(images, tokens)
    got = (ours.image, ours.text, ours.logit_scale.exp().reshape(1))
    torch.testing.assert_close(got, (image, text, scale), rtol=1e-12, atol=1e-14)

    weights = torch.randn(3, 16, dtype=torch.float64)
    (ours.image * weights + ours.text * weights).sum().backward()
    (image * weights + text * weights).sum().backward()
    for (name, mine), theirs in zip(model.towers.named_parameters(), own.parameters(), strict=True):
        if name != "logit_scale":
            assert mine.grad is not None and theirs.grad is not None, name
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-13)


def test_trimmed_tokens_keep_every_end_of_text() -> None:
    model = build_model(SMALL, seed=0)
    tokens = tokens_of("a", "a long caption with more words than fit into the whole context of it")
    assert model.trim_tokens(tokens[:1]).shape == (1, 3)
    assert model.trim_tokens(tokens).shape == (2, 12)
    assert model.trim_tokens(tokens[:0]).shape == (0, 12)


def test_a_bidirectional_text_tower_gets_its_tokens_whole() -> None:
    config = ModelConfig(**{**TABLES, "text_cfg": {**TABLES["text_cfg"], "no_causal_mask": True}})
    model = build_model(config, seed=0)
    assert model.trim_tokens(tokens_of("a")).shape == (1, 12)


@settings(deadline=None, max_examples=30)
@given(value=st.floats(-2, 8), toward=st.sampled_from([-1.0, 1.0]))
def test_the_log_scale_is_bounded_and_can_come_back(value: float, toward: float) -> None:
    bound = 4.605170185988092
    model = build_model(SMALL, seed=0).double()
    with torch.no_grad():
        model.towers.logit_scale.fill_(value)
    scale = model.bounded_logit_scale()
    assert float(scale.detach()) == min(value, bound)
    (toward * scale).backward()
    # A descent step moves against the gradient: above the bound only a step down is let through.
    expected = toward if value <= bound or toward > 0 else 0.0
    assert model.towers.logit_scale.grad.tolist() == [expected]


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second, other = (build_model(SMALL, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    prints = [fingerprint_of(m.record, open_clip_weights(m.towers)) for m in (first, second, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "ViT-B-33"}, "model.name = 'ViT-B-33': open_clip has no such architecture"),
        ({"name": "coca_ViT-B-32"}, "CoCa"),
        ({"name": "ViT-B-32", "pretrained": "x"}, "pretrained = 'x': no such file and no tag of ViT-B-32"),
        ({**TABLES, "pretrained": "nowhere.pt"}, "model.pretrained = 'nowhere.pt': neither a weights file"),
        ({**TABLES, "vision_cfg": {"image_size": 16, "widht": 3}}, "open_clip cannot build these towers"),
    ],
)
def test_wrong_models_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.split(";")[0].replace("(", "\\(")):
        build_model(ModelConfig(**config), seed=0)


def test_a_tag_without_network_is_one_line_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unreachable = FileNotFoundError("Failed to download file (x). Last error: offline\nand ten lines more")

    def offline(*_: object, **__: object) -> str:
        logging.getLogger("hub").warning("Retrying")
        raise unreachable

    monkeypatch.setattr("open_clip.download_pretrained", offline)
    message = (
        r"^model\.pretrained = 'openai': its weights cannot be downloaded \(Failed .* offline\); "
        r"where there is no network, name a downloaded weights file: model\.pretrained=FILE$"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        named_pretrained("RN50", "openai", key="model.pretrained")
    assert caught.value.__cause__ is unreachable and caplog.records == []
    logging.getLogger("hub").warning("heard again")
    assert len(caplog.records) == 1


def test_fine_tuning_starts_from_an_exported_folder_and_from_a_weights_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    start = build_model(SMALL, seed=5)
    weights = open_clip_weights(start.towers)
    save_file(weights, tmp_path / "weights.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(start.record.to_json())
    expected = fingerprint_of(start.record, weights)
    for source in (tmp_path / "weights.safetensors", folder):
        model = build_model(SMALL.model_copy(update={"pretrained": str(source)}), seed=0)
        assert fingerprint_of(model.record, open_clip_weights(model.towers)) == expected

    other = ModelConfig(**{**TABLES, "embed_dim": 8}, pretrained=str(folder))
    with pytest.raises(CheckpointError, match=r"has shape .* the model wants"):
        build_model(other, seed=0)


def test_weights_trained_by_softmax_go_on_with_a_fresh_bias(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    start = open_clip_weights(build_model(SMALL, seed=5).towers)
    save_file(start, tmp_path / "weights.safetensors")
    config = SMALL.model_copy(update={"pretrained": str(tmp_path / "weights.safetensors")})
    weights = open_clip_weights(build_model(config, seed=0, needs_logit_bias=True).towers)
    assert weights.pop("logit_bias") == -10.0
    assert weights.keys() == start.keys()
    assert all(torch.equal(weights[name], start[name]) for name in start)


def test_locked_towers_do_not_train() -> None:
    configs = [SMALL.model_copy(update={key: True}) for key in ("lock_image", "lock_text")]
    image, text = (build_model(config, seed=0) for config in configs)
    trained = {name.split(".")[0] for name, p in image.towers.named_parameters() if p.requires_grad}
    assert "visual" not in trained and {"transformer", "logit_scale"} <= trained
    trained = {name.split(".")[0] for name, p in text.towers.named_parameters() if p.requires_grad}
    assert trained == {"visual", "logit_scale"}


def test_an_export_of_an_export_is_the_same_model(tmp_path: Path) -> None:
    model = load_model(_exported(tmp_path / "first"))
    again = load_model(export_model(tmp_path / "first", tmp_path / "second"))
    assert model.fingerprint == again.fingerprint
    assert (tmp_path / "first/open_clip_model.safetensors").read_bytes() == (
        tmp_path / "second/open_clip_model.safetensors"
    ).read_bytes()


def test_a_run_that_went_on_is_read_from_its_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fingerprints = []
    for step in (1, 2):
        _save(run, step=step)
        fingerprints.append(export_model(run, tmp_path / f"step-{step}") / "clipstack.json")
    first, second = (json.loads(path.read_text())["fingerprint"] for path in fingerprints)
    assert first != second
    shutil.copytree(tmp_path / "step-1", run / "export")
    assert load_model(run).fingerprint == second
    shutil.rmtree(run / "export")
    shutil.copytree(tmp_path / "step-2", run / "export")
    (run / "checkpoints/step-00000002/open_clip_model.safetensors").unlink()  # nobody looks there now
    assert load_model(run).fingerprint == second


def test_a_card_shows_what_was_measured_of_these_weights_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _save(run, step=1)
    lines = [{"step": step, "samples_seen": 8 * step, "n": 4, "top1": 0.25 * step} for step in (1, 1, 2)]
    lines[1]["top1"] = 0.7
    (run / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for source in (run, run / "checkpoints/step-00000001"):
        card = (export_model(source, tmp_path / "out") / "MODEL_CARD.md").read_text()
        assert "0.7" in card and "0.25" not in card and "0.5" not in card
    _save(run, step=3)
    assert "0.7" not in (export_model(run, tmp_path / "out") / "MODEL_CARD.md").read_text()


def _save(run: Path, *, step: int) -> None:
    """A checkpoint of a model whose weights are those of seed `step`."""
    from clipstack.checkpoint.snapshot import Snapshot, save_snapshot

    model = build_model(SMALL, seed=step)
    snapshot = Snapshot(
        step=step, samples_seen=8 * step, record=model.record, max_logit_scale=model.max_logit_scale,
        weights=open_clip_weights(model.towers), optimizer={}, objective={}, order={}, recipe_toml="",
    )  # fmt: skip
    save_snapshot(run / "checkpoints", snapshot)


def _exported(folder: Path) -> Path:
    _save(folder.with_name(folder.name + "-run"), step=1)
    return export_model(folder.with_name(folder.name + "-run"), folder)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ViT-B-99999", ConfigError, "--model = 'ViT-B-99999': there is no such folder, and open_clip has"),
        ("vitb32", ConfigError, "did you mean 'ViT-B-32'"),
        ("nope", ConfigError, r"no such architecture; open_clip\.list_models\(\) names them"),
        (f"{Path(__file__).parent}x/losses", ConfigError, "not a folder"),
        ("tests/clipstak", ConfigError, "did you mean tests/clipstack"),
        ("./nowhere", ConfigError, "not a folder"),
        ("nowhere/at/all/", ConfigError, "not a folder"),
    ],
)
def test_load_model_says_what_it_could_not_find(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(name)


def test_what_the_hub_does_not_give_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("hf-hub:", "hf-hub:nobody/nothing"):
        with pytest.raises(ConfigError, match=f"--model {name}: the Hugging Face hub gives no such model"):
            load_model(name)
    with pytest.raises(ConfigError, match="pretrained = 'openai': hf-hub:nobody/nothing has weights of its"):
        load_model("hf-hub:nobody/nothing", pretrained="openai")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model here"):
        load_model(tmp_path)
    (_exported(tmp_path / "m") / "open_clip_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path / "m")
