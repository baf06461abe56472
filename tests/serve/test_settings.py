"""Defaults, file, environment and flags; each mistake named with its fix."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from clipstack.errors import ConfigError
from serve.cli import add_arguments, settings_of
from serve.security import hash_token
from serve.settings import MIB, Settings, default_model_id, load_settings


def parse(*flags: str, **environ: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_of(
        parser.parse_args(flags), {f"CLIPSTACK_SERVE_{name}": value for name, value in environ.items()}
    )


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('models = ["a=run"]\nport = 1\nmax_texts = 1\nmax_images = 1\n')
    settings = parse("--settings", str(file), "--port", "3", PORT="2", MAX_TEXTS="2")
    assert (settings.port, settings.max_texts, settings.max_images) == (3, 2, 1)
    assert settings.max_body_bytes == 32 * MIB
    assert parse(SETTINGS=str(file)).port == 1


def test_help_names_the_unit_of_each_value() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    shown = {action.dest: action.metavar for action in parser._actions}
    assert "X" not in shown.values()
    assert (shown["port"], shown["host"], shown["max_body_bytes"]) == ("PORT", "HOST", "BYTES")
    assert (shown["grace_s"], shown["request_timeout_ms"]) == ("SECONDS", "MILLISECONDS")
    assert (shown["max_texts"], shown["rate_limit_per_s"]) == ("N", "N")
    assert (shown["label_set_file"], shown["gallery"]) == ("FILE", "FOLDER")


def test_models_are_sources_with_or_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "demo" / "export").mkdir(parents=True)
    settings = parse("--model", str(tmp_path / "demo" / "export"), "--model", "big=ViT-L-14")
    assert [(spec.id, spec.source) for spec in settings.models][1] == ("big", "ViT-L-14")
    assert settings.models[0].id == "demo"
    assert [spec.id for spec in parse(MODEL="ViT-B-32, x=ViT-B-16").models] == ["ViT-B-32", "x"]
    assert default_model_id(str(tmp_path / "demo")) == "demo"
    assert (
        parse("--model", "ViT-B-32", "--pretrained", "w.safetensors").models[0].pretrained == "w.safetensors"
    )


def test_several_values_come_as_commas_or_json() -> None:
    assert parse(URL_FETCH_HOSTS="a.example,b.example").url_fetch_hosts == ("a.example", "b.example")
    assert parse(CORS_ORIGINS='["https://a.example"]').cors_origins == ("https://a.example",)


def test_the_demo_model_is_served_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse().models == ()
    export = tmp_path / "runs" / "demo" / "export"
    export.mkdir(parents=True)
    assert parse().models == ()
    (export / "open_clip_config.json").touch()
    assert [spec.id for spec in parse().models] == ["demo"]


def test_kubernetes_variables_of_a_service_of_our_name_are_no_settings() -> None:
    assert (
        parse(SERVICE_HOST="10.0.0.1", PORT_8000_TCP="tcp://10.0.0.1:8000", SERVICE_PORT="8000").port == 8000
    )


@pytest.mark.parametrize(
    ("flags", "environ", "words"),
    [
        ((), {"PROT": "1"}, ("CLIPSTACK_SERVE_PROT", "PORT")),
        (("--port", "70000"), {}, ("port", "70000")),
        (("--max-texts", "0"), {}, ("max_texts", "'0'")),
        (("--dtype", "int3"), {}, ("dtype", "float32")),
        (("--model", "=x"), {}, ("models", "id")),
        (("--model", "a", "--model", "a"), {}, ("models", "id=source")),
        (("--token-hashes", "secret"), {}, ("token_hashes", "--hash-token")),
        (("--root-path", "clip"), {}, ("root_path", "'clip'", "/clip")),
        (("--root-path", "/clip/"), {}, ("root_path", "'/clip/'")),
        (("--pretrained", "x"), {}, ("pretrained", "--model")),
        (("--settings", "/nonexistent.toml"), {}, ("settings", "/nonexistent.toml")),
        ((), {"CORS_ORIGINS": "[1"}, ("cors_origins",)),
    ],
)  # fmt: skip
def test_mistakes_name_the_setting_and_the_fix(
    flags: Any, environ: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # away from the demo's run, which is a model to serve
    with pytest.raises(ConfigError) as caught:
        parse(*flags, **environ)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_token_hash_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"token_hashes": ["my-real-token"]})
    assert "my-real-token" not in str(caught.value)
    assert load_settings({"token_hashes": [hash_token("x").upper()]}).token_hashes == (hash_token("x"),)
