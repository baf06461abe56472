"""Serving speed: our server beside infinity and LitServe, in one run, on the same random CLIP.

    python benchmarks/serve.py --infinity PYTHON --litserve PYTHON [--model small|ViT-B-32] [--rounds 10]
    [--json OUT]

PYTHON is the interpreter of an environment that has the peer: `infinity-emb[server,torch]==0.0.78
transformers<=5.0`, `litserve==0.2.19 open_clip_torch`. Left out, that peer is left out. Every server gets the
same requests, one
640x480 JPEG each, and every vector that comes back is compared with open_clip's own in float32.

Closed loop: C clients, each with one request under way. Open loop: requests at Poisson times, timed from the
moment they were meant to be sent, so that a server that stalls cannot hide it. Rounds alternate the order of
the
servers (ABBA), and one server is entered twice as a control (A/A): its ratio to itself shows the noise.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydantic_core

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_IMAGES = 32
LEAST_COSINE = 0.9999
ANSWER_S = 20.0  # a server that is silent for so long does not answer any more
LONG_TEXT = " ".join(
    ["red", "green", "blue", "small", "large", "round", "square", "old", "new", "bright"] * 6
)

SMALL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 256, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 4},
}


# The model, in open_clip's format and in Hugging Face's


def write_models(name: str, folder: Path) -> tuple[Path, Path]:
    """The same random weights as an exported folder and as a Hugging Face CLIP folder."""
    from safetensors.torch import save_file

    from clipstack.config import ModelConfig
    from clipstack.model import build_model, open_clip_weights

    config = ModelConfig(**SMALL) if name == "small" else ModelConfig(name=name)
    model = build_model(config, seed=0)
    weights = open_clip_weights(model.towers)
    ours, theirs = folder / "open_clip" / "bench", folder / "hugging_face" / "bench"
    for path in (ours, theirs):
        path.mkdir(parents=True, exist_ok=True)
    (ours / "open_clip_config.json").write_text(model.record.to_json())
    save_file(weights, ours / "open_clip_model.safetensors")
    save_file(
        _hugging_face_weights(weights, model.record.model_cfg), theirs / "model.safetensors", {"format": "pt"}
    )
    for file, value in _hugging_face_files(model.record.model_cfg).items():
        (theirs / file).write_text(value if isinstance(value, str) else json.dumps(value))
    return ours, theirs


def _hugging_face_weights(weights: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """open_clip's names and shapes -> transformers' CLIPModel."""
    out = {
        "logit_scale": weights["logit_scale"],
        "text_model.embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": weights["positional_embedding"],
        "text_projection.weight": weights["text_projection"].T.contiguous(),
        "vision_model.embeddings.class_embedding": weights["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": weights["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": weights["visual.positional_embedding"],
        "visual_projection.weight": weights["visual.proj"].T.contiguous(),
    }
    norms = {
        "text_model.final_layer_norm": "ln_final", "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
    }  # fmt: skip
    for new, old in norms.items():
        out |= {f"{new}.{part}": weights[f"{old}.{part}"] for part in ("weight", "bias")}
    for tower, prefix, layers in (
        ("text_model", "transformer", config["text_cfg"]["layers"]),
        ("vision_model", "visual.transformer", config["vision_cfg"]["layers"]),
    ):
        for layer in range(layers):
            out |= _hugging_face_block(
                weights, f"{prefix}.resblocks.{layer}", f"{tower}.encoder.layers.{layer}"
            )
    return out


def _hugging_face_block(weights: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    out = {}
    names = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    for part in ("weight", "bias"):
        out |= {f"{new}.{theirs}.{part}": weights[f"{old}.{ours}.{part}"] for ours, theirs in names.items()}
        thirds = weights[f"{old}.attn.in_proj_{part}"].chunk(3)
        for name, third in zip("qkv", thirds, strict=True):
            out[f"{new}.self_attn.{name}_proj.{part}"] = third.contiguous()
    return out


def _hugging_face_files(config: dict[str, Any]) -> dict[str, Any]:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    renamed = {"<start_of_text>": start, "<end_of_text>": end}
    vision, text = config["vision_cfg"], config["text_cfg"]
    common = {"hidden_act": "gelu", "projection_dim": config["embed_dim"]}
    return {
        "config.json": {
            "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config["embed_dim"],
            "vision_config": common | {
                "model_type": "clip_vision_model", "hidden_size": vision["width"],
                "num_hidden_layers": vision["layers"],
                "num_attention_heads": vision["width"] // vision.get("head_width", 64),
                "intermediate_size": 4 * vision["width"], "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
            },
            "text_config": common | {
                "model_type": "clip_text_model", "hidden_size": text["width"],
                "num_hidden_layers": text["layers"],
                "num_attention_heads": text["heads"], "intermediate_size": 4 * text["width"],
                "vocab_size": text.get("vocab_size", 49408),
                "max_position_embeddings": text.get("context_length", 77),
                "bos_token_id": 49406, "eos_token_id": 49407,
            },
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "crop_size": vision["image_size"],
            "do_center_crop": True,
            "do_normalize": True, "do_resize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": vision["image_size"],
        },
        "vocab.json": {renamed.get(word, word): index for word, index in tokenizer.encoder.items()},
        "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks) + "\n",
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "bos_token": start,
            "model_max_length": text.get("context_length", 77),
            "eos_token": end, "unk_token": end, "pad_token": end,
        },
        "special_tokens_map.json": {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end},
    }  # fmt: skip


# Requests and what their answers must be


@dataclass(frozen=True)
class Work:
    """Encoded images with the vectors open_clip gives for them, and a long text with its own."""

    images: list[bytes]
    vectors: np.ndarray[Any, Any]
    text_vector: np.ndarray[Any, Any]


def make_work(folder: Path, tar: Path | None) -> Work:
    import clipstack.preprocess  # noqa: F401 - prepares torchvision for open_clip
    import open_clip  # isort: skip
    import torch
    from PIL import Image

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    images = [_jpeg(seed) for seed in range(NUM_IMAGES)] if tar is None else _photos(tar)
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(io.BytesIO(data))) for data in images])
        vectors = model.encode_image(pixels, normalize=True).numpy()
        text = model.encode_text(tokenizer([LONG_TEXT]), normalize=True).numpy()[0]
    return Work(images, vectors, text)


def _jpeg(seed: int) -> bytes:
    """640x480, as detailed as a photograph: noise of all scales, about 100 KB."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    picture = np.full((480, 640, 3), 128.0)
    for cells in (4, 8, 16, 32, 64, 128, 240):
        noise = Image.fromarray((rng.random((cells, cells, 3)) * 255).astype(np.uint8))
        wide = noise.resize((640, 480), Image.Resampling.BICUBIC)
        picture += (np.asarray(wide, dtype=np.float64) - 128) * (2.2 / cells**0.35)
    out = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def _photos(tar: Path) -> list[bytes]:
    """Photographs of a shard, brought to 640x480."""
    import tarfile

    from PIL import Image, ImageOps

    with tarfile.open(tar) as shard:
        names = [name for name in shard.getnames() if name.endswith(".jpg")][:NUM_IMAGES]
        found = []
        for name in names:
            file = shard.extractfile(name)
            assert file is not None
            out = io.BytesIO()
            ImageOps.fit(Image.open(file).convert("RGB"), (640, 480)).save(out, "JPEG", quality=90)
            found.append(out.getvalue())
    return found


# Servers


@dataclass(frozen=True)
class Peer:
    """A server to measure: how to start it, where it listens, what it is asked and how it answers."""

    name: str
    command: Callable[[int], list[str]]
    ready: str
    path: str
    image_body: Callable[[str], dict[str, Any]]
    text_body: Callable[[str], dict[str, Any]]
    vector: Callable[[Any], str | list[float]]
    environ: dict[str, str] = field(default_factory=dict)


def _first_embedding(reply: Any) -> Any:
    return reply["data"][0]["embedding"]


def peers(args: argparse.Namespace, ours: Path, theirs: Path, state: Path) -> list[Peer]:
    found = [
        Peer(
            "clipstack",
            lambda port: [sys.executable, "-m", "serve.cli", "--model", f"bench={ours}", "--port", str(port),
                          "--log-level", "warning", *args.serve_flag],
            "/readyz", "/v1/embeddings",
            lambda uri: {"model": "bench", "input": [{"image": uri}], "encoding_format": "base64"},
            lambda text: {"model": "bench", "input": text, "encoding_format": "base64"},
            _first_embedding,
            {"XDG_STATE_HOME": str(state)},
        )
    ]  # fmt: skip
    if args.infinity:
        command = Path(args.infinity).parent / "infinity_emb"
        found.append(
            Peer(
                "infinity",
                lambda port: [str(command), "v2", "--model-id", str(theirs), "--served-model-name", "bench",
                              "--engine", "torch", "--device", "cpu", "--dtype", "float32",
                              "--port", str(port),
                              "--host", "127.0.0.1", "--no-bettertransformer"],
                "/health", "/embeddings",
                lambda uri: {"model": "bench", "input": [uri], "modality": "image",
                             "encoding_format": "base64"},
                lambda text: {"model": "bench", "input": [text], "encoding_format": "base64"},
                _first_embedding,
                {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"},
            )
        )  # fmt: skip
    if args.litserve:
        program = REPOSITORY / "benchmarks" / "serve_litserve.py"
        found.append(
            Peer(
                "litserve",
                lambda port: [args.litserve, str(program), str(ours), str(port)],
                "/health", "/predict",
                lambda uri: {"image": uri},
                lambda text: {"text": text},
                lambda reply: reply["embedding"],
            )
        )  # fmt: skip
    return found


@contextmanager
def running(peer: Peer) -> Iterator[tuple[int, int]]:
    """(port, process id) of a started peer, once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    log = tempfile.TemporaryFile()  # noqa: SIM115 - outlives this line, and closes with the process
    process = subprocess.Popen(
        peer.command(port), cwd=REPOSITORY, env={**os.environ, **peer.environ}, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not _answers(f"http://127.0.0.1:{port}{peer.ready}"):
            if process.poll() is not None or time.monotonic() > until:
                log.seek(0)
                raise SystemExit(
                    f"{peer.name} does not start:\n{log.read()[-3000:].decode(errors='replace')}"
                )
            time.sleep(0.2)
        yield port, process.pid
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with _suppress_gone():
            os.killpg(process.pid, signal.SIGKILL)  # children that a peer leaves behind


@contextmanager
def _suppress_gone() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


# The generator: HTTP/1.1 by hand, so that it costs the shared cores little


@dataclass
class Tally:
    """What came back: seconds of each good answer, how many of each status, vectors that were wrong."""

    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    wrong: int = 0
    least_cosine: float = 1.0
    elapsed_s: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.elapsed_s if self.elapsed_s else 0.0

    def quantile_ms(self, share: float) -> float:
        return 1000 * float(np.quantile(self.latencies, share)) if self.latencies else float("nan")


@dataclass(frozen=True)
class Shot:
    """A prepared request, with the vector that must come back (None: an error must)."""

    payload: bytes
    expected: np.ndarray[Any, Any] | None


class Target:
    """One server's prepared requests, and connections to it that are kept open."""

    def __init__(
        self, peer: Peer, port: int, work: Work, *, corrupt_share: float = 0.0, timeout_ms: int = 0
    ) -> None:
        self.peer, self.port = peer, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._timeout_ms = timeout_ms
        self.shots = [
            Shot(self._request(peer.image_body(_uri(data))), vector)
            for data, vector in zip(work.images, work.vectors, strict=True)
        ]
        self.text = Shot(self._request(peer.text_body(LONG_TEXT)), work.text_vector)
        self.corrupt = Shot(self._request(peer.image_body(_uri(work.images[0][:5000]))), None)
        self._rng = random.Random(0)
        self._corrupt_share = corrupt_share

    def _request(self, body: dict[str, Any]) -> bytes:
        content = json.dumps(body).encode()
        extra = f"X-Request-Timeout-Ms: {self._timeout_ms}\r\n" if self._timeout_ms else ""
        head = (
            f"POST {self.peer.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{extra}"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    def pick(self) -> Shot:
        return self.corrupt if self._rng.random() < self._corrupt_share else self._rng.choice(self.shots)

    async def fire(self, shot: Shot, tally: Tally, *, since: float | None = None) -> None:
        """Send one request, judge its answer, and note the time from `since` (else from now)."""
        started = time.perf_counter() if since is None else since
        status, body = await self._ask(shot.payload)
        ended = time.perf_counter()
        tally.statuses[status] = tally.statuses.get(status, 0) + 1
        if status == 200 and shot.expected is not None:
            tally.latencies.append(ended - started)
            self._judge(body, shot.expected, tally)

    async def _ask(self, payload: bytes) -> tuple[int, bytes]:
        """Status and body. A connection that the server closed while it idled is replaced, as clients do;
        a new one that closes without an answer, or is silent for ANSWER_S, counts as status 0.
        """
        while True:
            reused = bool(self._idle)
            reader, writer = (
                self._idle.pop() if reused else await asyncio.open_connection("127.0.0.1", self.port)
            )
            try:
                writer.write(payload)
                async with asyncio.timeout(ANSWER_S):
                    status, body, keep = await _read_reply(reader)
            except TimeoutError:
                writer.close()
                return 0, b""
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                if reused:
                    continue
                return 0, b""
            if keep:
                self._idle.append((reader, writer))
            else:
                writer.close()
            return status, body

    def _judge(self, body: bytes, expected: np.ndarray[Any, Any], tally: Tally) -> None:
        vector = self.peer.vector(pydantic_core.from_json(body))
        row = np.frombuffer(base64.b64decode(vector), "<f4") if isinstance(vector, str) else np.array(vector)
        cosine = float(row @ expected / max(np.linalg.norm(row), 1e-12))
        tally.least_cosine = min(tally.least_cosine, cosine)
        tally.wrong += cosine < LEAST_COSINE

    def close(self) -> None:
        """Close the connections: servers drop those that idle while another server is measured."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


def _uri(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


async def _read_reply(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
    else:
        body = await reader.readexactly(int(headers["content-length"]))
    return int(lines[0].split()[1]), body, headers.get("connection", "").lower() != "close"


async def closed_loop(target: Target, clients: int, seconds: float) -> Tally:
    """`clients` with one request under way each, for `seconds`."""
    tally = Tally()
    until = time.perf_counter() + seconds
    started = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() < until:
            await target.fire(target.pick(), tally)

    await asyncio.gather(*(client() for _ in range(clients)))
    tally.elapsed_s = time.perf_counter() - started
    target.close()
    return tally


async def open_loop(target: Target, rate: float, seconds: float, *, seed: int = 0) -> Tally:
    """Poisson arrivals at `rate` a second; each timed from when it was meant to be sent."""
    tally, rng, tasks = Tally(), random.Random(seed), []
    started = time.perf_counter()
    due = started
    while (due := due + rng.expovariate(rate)) < started + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(target.fire(target.pick(), tally, since=due)))
    await asyncio.gather(*tasks)
    tally.elapsed_s = max(seconds, time.perf_counter() - started)
    target.close()
    return tally


# Limits: what the hardware could do without a server


def limits(folder: Path, work: Work, *, seconds: float = 3.0) -> dict[str, float]:
    """images/s of the forward pass alone, and of decode + preparation + forward over all cores, in plain
    processes.
    """
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from benchmarks.serve import _limit_worker\n"
        "_limit_worker(sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))"
    )
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        for index, data in enumerate(work.images):
            Path(scratch, f"{index}.jpg").write_bytes(data)

        def run(what: str, processes: int, threads: int) -> float:
            environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "BENCH_IMAGES": scratch}
            arguments = [str(REPOSITORY), what, str(folder), str(threads), str(seconds)]
            started = [
                subprocess.Popen(
                    [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environ
                )
                for _ in range(processes)
            ]
            return sum(float(process.communicate()[0]) for process in started)

        return {
            "forward_per_s": max(run("forward", 1, cores), run("forward", cores, 1)),
            "pipeline_per_s": run("pipeline", cores, 1),
        }


def _limit_worker(what: str, folder: str, threads: int, seconds: float) -> None:
    """Images a second of one process, printed. Batches of 32."""
    from serve.images import ImageLimits, decode_image
    from serve.settings import Settings
    from serve.torch_runtime import TorchRuntime, load_runtime

    settings = Settings.model_validate({"models": [folder], "device_threads": threads})
    runtime = load_runtime(settings.models[0], settings)
    assert isinstance(runtime, TorchRuntime)
    files = [path.read_bytes() for path in sorted(Path(os.environ["BENCH_IMAGES"]).iterdir())]
    prepared = [runtime.prepare_image(decode_image(data, ImageLimits())) for data in files]
    runtime.encode_images(prepared)
    done, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        if what == "pipeline":
            prepared = [runtime.prepare_image(decode_image(data, ImageLimits())) for data in files]
        runtime.encode_images(prepared)
        done += len(prepared)
    print(done / (time.perf_counter() - started))


# The run


def measure(peer: Peer, work: Work, scenario: Callable[[Target], Any], **options: Any) -> Any:
    """Start a peer, warm it up, check its text vector, run the scenario."""
    with running(peer) as (port, _):
        target = Target(peer, port, work, **options)

        async def run() -> Any:
            await closed_loop(target, 8, 1.5)
            check = Tally()
            await target.fire(target.text, check)
            target.close()
            result = await scenario(target)
            return result, check

        return asyncio.run(run())


def rounds(found: Sequence[Peer], args: argparse.Namespace, work: Work) -> dict[str, Any]:
    """Closed loop at each concurrency, servers up all the time, orders alternating; one server twice as
    control.
    """
    entries = [(peer.name, peer) for peer in found] + (
        [("clipstack again", found[0])] if args.control else []
    )
    results: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name, _ in entries}
    texts: dict[str, float] = {}
    with ExitStack() as stack:
        started = {name: stack.enter_context(running(peer)) for name, peer in entries}
        targets = {name: Target(peer, started[name][0], work) for name, peer in entries}

        async def run() -> None:
            for name, target in targets.items():
                await closed_loop(target, 8, 2.0)
                check = Tally()
                await target.fire(target.text, check)
                target.close()
                texts[name] = check.least_cosine
                os.killpg(started[name][1], signal.SIGSTOP)  # only the server that is measured may run
            for number in range(args.rounds):
                order = list(targets.items())
                for name, target in order if number % 2 == 0 else order[::-1]:
                    os.killpg(started[name][1], signal.SIGCONT)
                    for clients in args.clients:
                        tally = await closed_loop(target, clients, args.seconds)
                        results[name].setdefault(str(clients), []).append(_row(tally))
                    os.killpg(started[name][1], signal.SIGSTOP)
                print(f"round {number + 1}/{args.rounds}", file=sys.stderr)

        asyncio.run(run())
    return {"closed": results, "text_cosine": texts}


def _row(tally: Tally) -> dict[str, float]:
    return {
        "per_s": tally.rate,
        "p50_ms": tally.quantile_ms(0.5),
        "p99_ms": tally.quantile_ms(0.99),
        "wrong": tally.wrong,
        "least_cosine": tally.least_cosine,
        "errors": sum(count for status, count in tally.statuses.items() if status != 200),
    }


async def _saturation(target: Target) -> float:
    return (await closed_loop(target, 32, 4.0)).rate


def open_scenarios(peer: Peer, work: Work, seconds: float) -> dict[str, Any]:
    """Open loop at shares of saturation, goodput at twice it, and the same with 1 % of the images corrupt."""

    async def scenario(target: Target) -> dict[str, Any]:
        top = await _saturation(target)
        out: dict[str, Any] = {"saturation_per_s": top}
        for share in (0.5, 0.7, 0.9):
            out[f"open {share:.0%}"] = _row(await open_loop(target, top * share, seconds))
        overload = await open_loop(target, top * 2, seconds)
        out["overload 2x"] = _row(overload) | {"goodput_share": overload.rate / top}
        target._corrupt_share = 0.01
        out["1 % corrupt"] = _row(await closed_loop(target, 32, seconds))
        return out

    result, _ = measure(peer, work, scenario, timeout_ms=2000)
    return dict(result)


def summary(report: dict[str, Any]) -> str:
    lines = [f"{'':18}" + "".join(f"{f'C={clients}':>26}" for clients in report["clients"])]
    lines.append(f"{'images/s · p50 ms':18}")
    for name, by_clients in report["closed"].items():
        cells = []
        for clients in report["clients"]:
            rows = by_clients[str(clients)]
            rate = statistics.median(row["per_s"] for row in rows)
            p50 = statistics.median(row["p50_ms"] for row in rows)
            cells.append(f"{rate:12.1f} · {p50:8.1f} ms")
        lines.append(f"{name:18}" + "".join(f"{cell:>26}" for cell in cells))
    for name in report["closed"]:
        if name != "clipstack":
            cells = []
            for clients in report["clients"]:
                pairs = zip(
                    report["closed"]["clipstack"][str(clients)],
                    report["closed"][name][str(clients)],
                    strict=True,
                )
                ratios = [ours["per_s"] / max(theirs["per_s"], 1e-9) for ours, theirs in pairs]
                cells.append(f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
            lines.append(f"{'ours / ' + name:18}"[:18] + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join([*lines, *_limit_lines(report)])


def _limit_lines(report: dict[str, Any]) -> list[str]:
    if "limits" not in report:
        return []
    rows = report["closed"]["clipstack"][str(max(report["clients"]))]
    best = statistics.median(row["per_s"] for row in rows)
    forward, pipeline = report["limits"]["forward_per_s"], report["limits"]["pipeline_per_s"]
    return [
        f"limits: forward {forward:.1f}/s, decode + preparation + forward {pipeline:.1f}/s",
        f"eta_fwd {best / forward:.3f}   eta_pipe {best / pipeline:.3f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--infinity", metavar="PYTHON", help="interpreter of an environment with infinity-emb"
    )
    parser.add_argument("--litserve", metavar="PYTHON", help="interpreter of an environment with litserve")
    parser.add_argument(
        "--model", default="small", help="small, or an open_clip architecture (default: small)"
    )
    parser.add_argument(
        "--photos", type=Path, metavar="TAR", help="shard of photographs to send; else made-up pictures"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument(
        "--no-control", dest="control", action="store_false", help="leave out the A/A control"
    )
    parser.add_argument(
        "--open", type=float, default=0.0, metavar="S", help="also run the open-loop rows, S seconds each"
    )
    parser.add_argument("--no-limits", dest="limits", action="store_false", help="leave out the limits")
    parser.add_argument(
        "--serve-flag", action="append", default=[], help="a flag for our server, as --serve-flag=--x"
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that every server is stopped
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs = write_models(args.model, Path(scratch))
        work = make_work(ours, args.photos)
        found = peers(args, ours, theirs, Path(scratch))
        report: dict[str, Any] = {"model": args.model, "clients": args.clients}
        if args.limits:
            report["limits"] = limits(ours, work)
        report |= rounds(found, args, work)
        print(summary(report), flush=True)
        if args.open:
            report["open"] = {peer.name: open_scenarios(peer, work, args.open) for peer in found}
    print(json.dumps({key: report[key] for key in ("text_cosine", "open") if key in report}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
