"""Every setting of the server, and how defaults, a TOML file, the environment and flags become one frozen
object.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from clipstack.errors import ConfigError

ENV_PREFIX = "CLIPSTACK_SERVE_"
MIB = 1024 * 1024
# Kubernetes adds such variables for a service that is named like our prefix; they are no settings.
_KUBERNETES_LINK = re.compile(r"SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_\w+")
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSpec(Frozen):
    """One model to serve."""

    id: str
    """The name that requests use; when left out, the run's, folder's or architecture's own name."""
    source: str = Field(min_length=1)
    """A run folder, an exported folder, or an open_clip architecture name."""
    pretrained: str | None = None
    """With an architecture name: a safetensors file or an open_clip tag."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`source` or `id=source` as text; without an id the source names the model."""
        if isinstance(value, str):
            name, equals, source = value.partition("=")
            value = {"id": name, "source": source} if equals else {"source": value}
        if isinstance(value, dict) and "id" not in value and isinstance(value.get("source"), str):
            return {**value, "id": default_model_id(value["source"])}
        return value

    @field_validator("id")
    @classmethod
    def _plain_id(cls, value: str) -> str:
        if not _MODEL_ID.fullmatch(value):
            raise ValueError(
                f"{value!r} is no model id: letters, digits and . _ : / -, up to 128; write id=source"
            )
        return value


def default_model_id(source: str) -> str:
    """The last part of the source that says something: `runs/demo/export` and `runs/demo` are both `demo`."""
    if not Path(source).is_dir():
        return source.rstrip("/").rsplit("/", 1)[-1] if source.startswith((".", "/")) else source
    path = Path(source).resolve()
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    return path.parent.name if path.name == "export" else path.name


class Settings(Frozen):
    """Flags, `CLIPSTACK_SERVE_*` variables and the settings file all set these fields."""

    models: tuple[ModelSpec, ...] = ()
    """Models to serve, each `source` or `id=source`; several: separated by commas."""
    allow_random_weights: bool = False
    """Serve an architecture without trained weights. For load tests only: its answers mean nothing."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    root_path: str = ""
    """Path under which a reverse proxy shows the server, such as /clip."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses of reverse proxies whose X-Forwarded-For and X-Forwarded-Proto headers count."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the API from a browser; none: only pages of this server."""
    load_in_background: bool = False
    """Listen at once and answer 503 until the models are loaded; off: load before listening."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    engine: Literal["auto", "torch", "openvino"] = "auto"
    """What computes the towers. openvino: on CPU, in float32, with the extra of that name; auto takes it
    where it is installed, can convert the model, passes the gate and is no slower than torch when timed at
    start.
    """
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Arithmetic of the towers; auto times both at start and takes bfloat16 where it is faster and passes the
    gate.
    """
    preprocess: Literal["fast", "exact"] = "fast"
    """fast: libjpeg-turbo and an integer resize, at most one grey level off; exact: Pillow, as in training.
    """
    device_threads: int = Field(default=0, ge=0)
    """CPU threads of a forward pass; 0: as many as this process may use."""
    device_lanes: int = Field(default=2, ge=1)
    """Batches that the device computes side by side. On a CPU they share out the threads, so that no core
    waits for another at the end of every operation; to a GPU the next one is handed while it computes.
    """
    decode_threads: int = Field(default=0, ge=0)
    """Threads that decode images beside the device; 0: one per core, at least two."""
    max_batch_images: int = Field(default=32, ge=1)
    """Most images in one forward pass."""
    max_batch_texts: int = Field(default=64, ge=1)
    """Most texts in one forward pass."""
    max_batch_bytes: int = Field(default=64 * MIB, ge=1)
    """Most bytes of prepared input in one forward pass."""

    max_queue_items: int = Field(default=512, ge=1)
    """Texts and images that one model may have accepted and not answered; above it requests get 429."""
    max_inflight_bytes: int = Field(default=512 * MIB, ge=1)
    """Bytes of request bodies held at once over all models; above it requests get 429."""
    request_timeout_ms: int = Field(default=30_000, ge=1)
    """Deadline of a request that names none in X-Request-Timeout-Ms."""
    max_request_timeout_ms: int = Field(default=120_000, ge=1)
    """Longest deadline that a request may name."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """Longest time that a client may take to send its body."""
    grace_s: float = Field(default=30.0, gt=0)
    """Time that accepted requests have to finish after SIGTERM."""
    drain_delay_s: float = Field(default=0.25, ge=0)
    """Time after SIGTERM in which new requests are still answered, with 503, before the port closes."""

    max_body_bytes: int = Field(default=32 * MIB, ge=1)
    """Largest request body."""
    max_image_bytes: int = Field(default=10 * MIB, ge=1)
    """Largest encoded image."""
    max_image_pixels: int = Field(default=50_000_000, ge=1)
    """Most pixels of an image, checked from its header before it is decoded."""
    max_texts: int = Field(default=256, ge=1)
    """Most texts in one request."""
    max_images: int = Field(default=64, ge=1)
    """Most images in one request."""
    max_text_chars: int = Field(default=2048, ge=1)
    """Longest text in characters, before tokens are counted; to clean one can take time in its square."""
    max_labels: int = Field(default=256, ge=1)
    """Most labels sent with a classify request."""
    max_label_set_labels: int = Field(default=10_000, ge=1)
    """Most labels of a registered label set."""
    max_templates: int = Field(default=100, ge=1)
    """Most templates of a request or label set."""
    max_prompts: int = Field(default=4096, ge=1)
    """Most labels times templates of a classify request."""
    max_label_set_prompts: int = Field(default=100_000, ge=1)
    """Most labels times templates of a registered label set: all are encoded when it is registered."""
    max_label_sets: int = Field(default=1000, ge=1)
    """Most registered label sets."""
    max_label_set_bytes: int = Field(default=16 * MIB, ge=1)
    """Most bytes of all registered label sets together, as they are stored."""
    label_cache_bytes: int = Field(default=256 * MIB, ge=0)
    """Memory for classifier matrices of labels seen before."""

    token_hashes: tuple[str, ...] = ()
    """SHA-256 of each bearer token that may call the API, in hexadecimal; none: no token is asked for."""
    admin_token_hashes: tuple[str, ...] = ()
    """SHA-256 of each token that may reload models; none: nobody may."""
    rate_limit_per_s: float = Field(default=0.0, ge=0)
    """Requests a second that one token (without tokens: one address) may send; 0: no limit."""
    rate_limit_burst: int = Field(default=20, ge=1)
    """Requests that may come at once before the rate limit bites."""
    url_fetch_hosts: tuple[str, ...] = ()
    """Host names that image_url may name; none: image_url is refused."""
    url_fetch_timeout_s: float = Field(default=5.0, gt=0)
    """Time for fetching one image, redirects included."""

    label_set_file: Path | None = None
    """SQLite file of the label sets; none: label-sets.sqlite3 in the user's state folder."""
    gallery: Path | None = None
    """Folder of images that the page at / searches by text."""
    max_gallery_images: int = Field(default=200, ge=1)
    """Most images read from the gallery folder, in order of their names."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines to write."""

    @field_validator("*", mode="before")
    @classmethod
    def _one_or_listed(cls, value: Any, info: Any) -> Any:
        """A text for a field of several values is a JSON array or separated by commas."""
        field = cls.model_fields[info.field_name]
        if not isinstance(value, str) or get_origin(field.annotation) is not tuple:
            return value
        if value.startswith("["):
            return json.loads(value)
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("root_path")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if value and (not value.startswith("/") or value.endswith("/")):
            raise ValueError(f"{value!r} must start with a slash and not end with one, such as /clip")
        return value

    @field_validator("token_hashes", "admin_token_hashes")
    @classmethod
    def _hexadecimal(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not re.fullmatch(r"[0-9a-fA-F]{64}", entry):
                raise ValueError(
                    "each entry is 64 hexadecimal digits; `clipstack serve --hash-token` makes one"
                )
        return tuple(entry.lower() for entry in value)

    @model_validator(mode="after")
    def _distinct_ids(self) -> Settings:
        ids = [spec.id for spec in self.models]
        for name in ids:
            if ids.count(name) > 1:
                raise ValueError(f"models: two are named {name!r}; write id=source to tell them apart")
        return self

    def check_models(self) -> None:
        """Raises ConfigError when there is nothing to serve."""
        if not self.models:
            raise ConfigError(
                "models: nothing to serve; name a run folder, an exported folder or an architecture, "
                "or make the demo model with `clipstack demo`"
            )

    @property
    def label_set_path(self) -> Path:
        if self.label_set_file is not None:
            return self.label_set_file
        state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        return Path(state) / "clipstack" / "label-sets.sqlite3"


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Settings:
    """Settings from flags over the environment over a TOML file over the defaults. Raises ConfigError."""
    values = {**_from_file(file), **_from_environment(environ or {}), **(flags or {})}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        shown = f" = {values[name]!r}" if name in values and "token" not in name else ""
        raise ConfigError(f"{name}{shown}: {first['msg']}; see clipstack serve --help") from error


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"settings = {str(path)!r}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings = {str(path)!r}: not TOML ({error})") from error
    for name in values:
        _known(name, where=f"{path}: ")
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    names = {key: key.removeprefix(ENV_PREFIX) for key in environ if key.startswith(ENV_PREFIX)}
    found = {}
    for key, name in names.items():
        if _KUBERNETES_LINK.fullmatch(name):
            continue
        field = "models" if name == "MODEL" else name.lower()
        if field != "settings":
            _known(field, where=ENV_PREFIX, show=str.upper)
            found[field] = environ[key]
    return found


def _known(name: str, *, where: str, show: Any = str) -> None:
    if name in Settings.model_fields:
        return
    near = difflib.get_close_matches(name, Settings.model_fields, n=1)
    hint = f"; did you mean {show(near[0])}?" if near else "; clipstack serve --help lists the settings"
    raise ConfigError(f"{where}{show(name)}: no such setting{hint}")
