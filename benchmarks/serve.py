"""Serving speed: our server beside infinity and LitServe, in one run, on the same random CLIP.

    python benchmarks/serve.py --infinity PYTHON --litserve PYTHON [--model small|ViT-B-32] [--rounds 10]
    [--open S] [--json OUT]

PYTHON is the interpreter of an environment that has the peer: `infinity-emb[server,torch]==0.0.78
transformers<=5.0`, `litserve==0.2.19 open_clip_torch`. Left out, that peer is left out. Every server gets the
same requests, one 640x480 JPEG each, and every vector that comes back is compared with open_clip's own in
float32, after the clock has stopped.

Closed loop: C clients, each with one request under way. Open loop: requests at Poisson times, timed from the
moment they were meant to be sent, so that a server that stalls cannot hide it. Rounds alternate the order of
the servers (ABBA), and one server is entered twice as a control (A/A): its ratio to itself shows the noise.
In every round plain processes do the same work without a server, as the limit of what the cores can do: with
torch, and with the engine that our server chose where that is another.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serve_load import Answer, Run, closed_loop, open_loop, post, session_cpu_s

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_IMAGES = 32
LEAST_COSINE = 0.9999
CORES = len(os.sched_getaffinity(0))
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

    from clipstack.config.models import ModelConfig
    from clipstack.model import build_model
    from clipstack.towers import open_clip_weights

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


# One server under load


DEADLINE_S = 2.0  # of the open-loop rows
Row = dict[str, float]


class Target:
    """A running server with its prepared requests, and what must come back for each."""

    def __init__(self, peer: Peer, port: int, leader: int, work: Work) -> None:
        self.peer, self._port, self._leader = peer, port, leader
        images = [peer.image_body(_uri(data)) for data in work.images]
        bodies = [*images, peer.text_body(LONG_TEXT), peer.image_body(_uri(work.images[0][:5000]))]
        self._num_images = len(images)
        self._text, self._corrupt = len(images), len(images) + 1
        # None: an error must come back.
        self._expected = [*work.vectors, work.text_vector, None]
        timeout = {"X_Request_Timeout_Ms": f"{1000 * DEADLINE_S:.0f}"}
        encoded = [json.dumps(body).encode() for body in bodies]
        self._patient = [post(peer.path, body) for body in encoded]
        self._hurried = [post(peer.path, body, **timeout) for body in encoded]
        self._rng = random.Random(0)

    def _picks(self, corrupt_share: float = 0.0) -> Iterator[int]:
        while True:
            is_corrupt = self._rng.random() < corrupt_share
            yield self._corrupt if is_corrupt else self._rng.randrange(self._num_images)

    def closed(self, clients: int, seconds: float, *, corrupt_share: float = 0.0) -> Row:
        """Closed loop with images."""
        cpu_s = session_cpu_s(self._leader)
        picks = self._picks(corrupt_share)
        run = closed_loop(self._port, self._patient, picks, clients=clients, seconds=seconds)
        return self._row(run, session_cpu_s(self._leader) - cpu_s)

    def open(self, rate: float, seconds: float) -> Row:
        """Open loop with images: Poisson arrivals at `rate` a second, each with a deadline of DEADLINE_S."""
        cpu_s, rng = session_cpu_s(self._leader), random.Random(0)
        gaps = (rng.expovariate(rate) for _ in itertools.count())
        due = itertools.takewhile(lambda at: at < seconds, itertools.accumulate(gaps))
        run = open_loop(self._port, self._hurried, self._picks(), due_s=due)
        row = self._row(run, session_cpu_s(self._leader) - cpu_s)
        good = [answer for answer in run.answers if answer.status == 200 and answer.seconds <= DEADLINE_S]
        ended_at = max((answer.ended_at for answer in good), default=run.started_at)
        row["in_time_per_s"] = len(good) / max(seconds, ended_at - run.started_at)
        row["late_ms"] = 1000 * float(np.quantile(run.lateness_s, 0.99))  # the generator's own fault
        return row

    def answers_image(self) -> bool:
        """Whether one image alone is answered."""
        picks = self._picks()
        return closed_loop(self._port, self._patient, picks, clients=1, seconds=0).answers[0].status == 200

    def text_cosine(self) -> float:
        """Of the long text's vector to open_clip's."""
        picks = iter([self._text])
        run = closed_loop(self._port, self._patient, picks, clients=1, seconds=0)
        return self._cosine(run.answers[0])

    def _row(self, run: Run, server_cpu_s: float) -> Row:
        """Figures of a load. Every vector is compared here, when the clock has stopped."""
        good = [answer for answer in run.answers if answer.status == 200 and answer.request != self._corrupt]
        cosines = [self._cosine(answer) for answer in good]
        latencies = [answer.seconds for answer in good] or [float("nan")]
        used_s = server_cpu_s + run.client_cpu_s
        return {
            "per_s": len(good) / run.elapsed_s,
            "p50_ms": 1000 * float(np.quantile(latencies, 0.5)),
            "p99_ms": 1000 * float(np.quantile(latencies, 0.99)),
            "wrong": sum(cosine < LEAST_COSINE for cosine in cosines),
            "least_cosine": min(cosines, default=float("nan")),
            "errors": len(run.answers) - len(good),
            "silent": sum(answer.status == 0 for answer in run.answers),
            "server_ms": 1000 * server_cpu_s / len(run.answers),
            "client_ms": 1000 * run.client_cpu_s / len(run.answers),
            "client_share": run.client_cpu_s / (CORES * run.elapsed_s),
            "unused_share": 1 - used_s / (CORES * run.elapsed_s),
        }

    def _cosine(self, answer: Answer) -> float:
        expected = self._expected[answer.request]
        vector = self.peer.vector(pydantic_core.from_json(answer.body))
        row = np.frombuffer(base64.b64decode(vector), "<f4") if isinstance(vector, str) else np.array(vector)
        return float(row @ expected / max(np.linalg.norm(row), 1e-12))


def _uri(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


# Limits: what the hardware could do without a server


class Bare:
    """Plain processes that do a server's work without a server, with one engine. They wait, and run when they
    are asked to.
    """

    def __init__(self, folder: Path, work: Work, engine: str, stack: ExitStack) -> None:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        for index, data in enumerate(work.images):
            Path(scratch, f"{index}.jpg").write_bytes(data)

        def start(threads: int) -> subprocess.Popen[str]:
            code = "import sys; from benchmarks.serve import bare_worker; bare_worker(*sys.argv[1:])"
            worker = subprocess.Popen(
                [sys.executable, "-c", code, str(folder), scratch, str(threads), engine],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip
            stack.enter_context(worker)
            stack.callback(worker.kill)
            return worker

        self._one_each = [start(1) for _ in range(CORES)]
        self._all_in_one = [start(CORES)]
        for worker in [*self._one_each, *self._all_in_one]:
            assert worker.stdout is not None
            worker.stdout.readline()  # it has loaded the model

    def rates(self, seconds: float) -> Row:
        """images/s: of the forward pass alone, and of decode + preparation + forward, on all cores.

        The best of batches of 32 and of 8 (which stay in the cache), and for the forward pass also of one
        process with all threads.
        """
        ways = [("forward", self._all_in_one, 32)]
        ways += [(what, self._one_each, batch) for what in ("forward", "pipeline") for batch in (32, 8)]
        rates = [(what, self._rate(workers, what, batch, seconds)) for what, workers, batch in ways]
        return {
            f"{kind}_per_s": max(rate for what, rate in rates if what == kind)
            for kind in ("forward", "pipeline")
        }

    def _rate(self, workers: Sequence[subprocess.Popen[str]], what: str, batch: int, seconds: float) -> float:
        for worker in workers:
            assert worker.stdin is not None
            print(what, batch, seconds, file=worker.stdin, flush=True)
        total = 0.0
        for worker in workers:
            assert worker.stdout is not None
            total += float(worker.stdout.readline())
        return total


def bare_worker(folder: str, images: str, threads: str, engine: str) -> None:
    """For each line `WHAT BATCH SECONDS` on standard input, print the images a second of this process."""
    from serve.images import ImageLimits, decode_image
    from serve.loading import load_runtime
    from serve.settings import Settings

    settings = Settings.model_validate(
        {"models": [folder], "engine": engine, "device_threads": int(threads), "device_lanes": 1}
    )
    runtime = load_runtime(settings.models[0], settings)
    files = [path.read_bytes() for path in sorted(Path(images).iterdir())]
    prepared = [runtime.prepare_image(decode_image(data, ImageLimits())) for data in files]
    runtime.encode_images(prepared)
    print("ready", flush=True)
    for line in sys.stdin:
        what, size, seconds = line.split()
        done, started = 0, time.perf_counter()
        while time.perf_counter() < started + float(seconds):
            batch = [index % len(files) for index in range(done, done + int(size))]
            if what == "pipeline":
                images = [runtime.prepare_image(decode_image(files[i], ImageLimits())) for i in batch]
            else:
                images = [prepared[i] for i in batch]
            runtime.encode_images(images)
            done += len(batch)
        print(done / (time.perf_counter() - started), flush=True)


def engine_of(port: int) -> str:
    """Which engine our server computes with, by the first word of its name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as reply:
        return str(json.load(reply)["data"][0]["engine"]).split()[0]


# The run


def rounds(found: Sequence[Peer], args: argparse.Namespace, work: Work, folder: Path) -> dict[str, Any]:
    """Closed loop at each concurrency, and the limits, in every round. Servers are up all the time, and
    stopped while they are not measured; orders alternate; one server is entered twice as a control.
    """
    entries = [(peer.name, peer) for peer in found] + (
        [("clipstack again", found[0])] if args.control else []
    )
    results: dict[str, dict[str, list[Row]]] = {
        name: {str(clients): [] for clients in args.clients} for name, _ in entries
    }
    texts: dict[str, float] = {}
    limits: dict[str, list[Row]] = {}
    with ExitStack() as stack:
        started = {name: stack.enter_context(running(peer)) for name, peer in entries}
        targets = {name: Target(peer, *started[name], work) for name, peer in entries}
        engine = engine_of(started[found[0].name][0])
        for name, target in targets.items():
            target.closed(8, 2.0)
            texts[name] = target.text_cosine()
            os.killpg(started[name][1], signal.SIGSTOP)  # only the server that is measured may run
        engines = dict.fromkeys(["torch", engine]) if args.limits else {}
        bare = {name: Bare(folder, work, name, stack) for name in engines}
        for number in range(args.rounds):
            for name, processes in bare.items():
                limits.setdefault(name, []).append(processes.rates(args.seconds))
            order = list(targets.items())
            for name, target in order if number % 2 == 0 else order[::-1]:
                os.killpg(started[name][1], signal.SIGCONT)
                target.closed(1, 0.2)
                for clients in args.clients:
                    results[name][str(clients)].append(target.closed(clients, args.seconds))
                os.killpg(started[name][1], signal.SIGSTOP)
            print(f"round {number + 1}/{args.rounds}", file=sys.stderr)
    return {"closed": results, "text_cosine": texts, "limits": limits, "engine": engine}


class Revived:
    """A peer that is started again whenever it does not answer any more."""

    def __init__(self, peer: Peer, work: Work) -> None:
        self._peer, self._work = peer, work
        self._stack = ExitStack()
        self.starts = 0

    def __enter__(self) -> Revived:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        port, leader = self._stack.enter_context(running(self._peer))
        self._target = Target(self._peer, port, leader, self._work)
        self._target.closed(8, 2.0)
        self.starts += 1

    def target(self) -> Target:
        """The peer, answering."""
        if not self._target.answers_image():
            self._stack.close()
            self._start()
        return self._target


def open_scenarios(peer: Peer, work: Work, seconds: float) -> dict[str, Any]:
    """Open loop at shares of its saturation, goodput at twice it, and closed loop with 1 % of the images
    corrupt.
    """
    with Revived(peer, work) as revived:
        top = revived.target().closed(32, 4.0)["per_s"]
        out: dict[str, Any] = {"saturation_per_s": top}
        for share in (0.5, 0.7, 0.9, 2.0):
            row = revived.target().open(top * share, seconds)
            out[f"open {share:.0%}"] = row | {"in_time_share": row["in_time_per_s"] / top}
        out["1 % corrupt"] = revived.target().closed(32, seconds, corrupt_share=0.01)
        out["answers afterwards"] = float(revived._target.answers_image())
        out["starts"] = revived.starts
    return out


# The report


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def summary(report: dict[str, Any]) -> str:
    """Tables of medians over the rounds; ratios are those of each round."""
    lines = [_line("", [f"C={clients}" for clients in report["clients"]])]
    for title, cell in (
        ("images/s · p50 ms", lambda row: "{per_s:.1f} · {p50_ms:.1f} ms".format(**row)),
        (
            "server + client ms, unused",
            lambda row: "{server_ms:.1f} + {client_ms:.2f}, {unused_share:.0%}".format(**row),
        ),
    ):
        lines += ["", title]
        for name, rows in report["closed"].items():
            lines.append(_line(name, [cell(_medians(rows[str(c)])) for c in report["clients"]]))
    ours = report["closed"]["clipstack"]
    lines += ["", "images/s of clipstack over"]
    for name, rows in report["closed"].items():
        if name != "clipstack":
            pairs = [_ratios(ours[str(c)], rows[str(c)]) for c in report["clients"]]
            lines.append(_line(name, [_spread(ratios) for ratios in pairs]))
    return "\n".join([*lines, *_limit_lines(report, ours)])


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:28}" + "".join(f"{cell:>26}" for cell in cells)


def _medians(rows: Sequence[Row]) -> Row:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _ratios(ours: Sequence[Row], theirs: Sequence[Row]) -> list[float]:
    pairs = zip(ours, theirs, strict=True)
    return [mine["per_s"] / max(other["per_s"], 1e-9) for mine, other in pairs]


def _limit_lines(report: dict[str, Any], ours: dict[str, list[Row]]) -> list[str]:
    """The server's rate as a share of what plain processes do on all cores in the same round: with torch, and
    with the engine that the server uses. The second figure of each is the share of what the client's own
    processor time leaves of that.
    """
    lines = []
    for engine, limits in report["limits"].items():
        rates = "forward {forward_per_s:.1f}, decode + preparation + forward {pipeline_per_s:.1f}"
        lines += ["", f"images/s of plain processes with {engine}: " + rates.format(**_medians(limits))]
        for name, key in (("eta_fwd", "forward_per_s"), ("eta_pipe", "pipeline_per_s")):
            for suffix, counts_client in (("", False), (", client's time left out", True)):
                cells = [
                    _spread(_shares(ours[str(clients)], limits, key, counts_client=counts_client))
                    for clients in report["clients"]
                ]
                lines.append(_line(name + suffix, cells))
    return lines


def _shares(ours: Sequence[Row], limits: Sequence[Row], key: str, *, counts_client: bool) -> list[float]:
    return [
        row["per_s"] / limit[key] / (1 - counts_client * row["client_share"])
        for row, limit in zip(ours, limits, strict=True)
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
    parser.add_argument("--rounds", type=int, default=10, help="0: only the open loop")
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
        if args.rounds:
            report |= rounds(found, args, work, ours)
            print(summary(report), flush=True)
        if args.open:
            report["open"] = {peer.name: open_scenarios(peer, work, args.open) for peer in found}
    print(json.dumps({key: report[key] for key in ("text_cosine", "open") if key in report}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
