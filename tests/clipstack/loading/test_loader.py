"""The loader: one order whatever the workers and ranks, equal batches always, no process left behind."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipstack.config.models import AugmentConfig, DataConfig, SourceConfig
from clipstack.errors import ConfigError, DataError, WorkerError
from clipstack.loading.eval_loader import EvalLoader
from clipstack.loading.train_loader import Batch, TrainLoader
from clipstack.loading.unindexed import UnindexedWarning
from clipstack.preprocess import Preprocess
from clipstack.world import World
from data_pipelines.index import Sample, load_index, write_shard

PREPROCESS = Preprocess(
    image_size=(16, 16),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    context_length=12,
    augment=AugmentConfig(crop_scale=(0.5, 1.0), hflip=True, color_jitter=(0.2, 0.2, 0.2, 0.05)),
)
SIZES = (30, 3, 17, 50, 1, 19)
N = sum(SIZES)


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uneven shards, some smaller than a batch; images 0 and 40 are equal, captions repeat."""
    folder = tmp_path_factory.mktemp("shards")
    number = 0
    for shard, size in enumerate(SIZES):
        samples = []
        for i in range(number, number + size):
            members = {
                "jpg": jpeg(0 if i == 40 else i),
                "txt": f"caption {i % 10}".encode(),
                "cls": b"%d" % (i % 5),
            }
            samples.append(Sample(f"{i:04}", members))
        write_shard(folder / f"s{shard}.tar", samples)
        number += size
    return folder


def loader(
    shards: Path,
    *,
    batch_size: int = 24,
    workers: int = 0,
    world: World | None = None,
    seed: int = 5,
    quarantine: Path | None = None,
    **options: object,
) -> TrainLoader:
    config = DataConfig.model_validate({"train": str(shards), "workers": workers, **options})
    return TrainLoader(
        config,
        preprocess=PREPROCESS,
        batch_size=batch_size,
        world=world or World(),
        seed=seed,
        quarantine_path=quarantine,
    )


def take(
    source: TrainLoader, batches: int, start: int = 0, skip: tuple[tuple[int, int], ...] = ()
) -> list[Batch]:
    taken = list(islice(source.iterate(start, skip), batches))
    source.close()
    return taken


def digest(batches: list[Batch]) -> str:
    value = hashlib.sha256()
    for batch in batches:
        for tensor in batch[:4]:
            value.update(tensor.numpy().tobytes())
        value.update(json.dumps([batch.keys, batch.next_sample]).encode())
    return value.hexdigest()


def test_a_batch_holds_what_the_shards_hold(shards: Path) -> None:
    (batch,) = take(loader(shards), 1)
    assert batch.images.shape == (24, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert batch.tokens.shape == (24, 12) and batch.tokens.dtype == torch.int64
    numbers = [int(key[-4:]) for key in batch.keys]
    assert batch.sample_index.tolist() == numbers
    assert torch.equal(batch.tokens, PREPROCESS.tokenize([f"caption {i % 10}" for i in numbers]))
    assert batch.next_sample == 24


def test_sample_ids_are_equal_where_image_or_caption_bytes_are_equal(shards: Path) -> None:
    batches = take(loader(shards, batch_size=N), 1)
    order = torch.argsort(batches[0].sample_index)
    ids = batches[0].sample_ids[order]
    assert ids[0, 0] == ids[40, 0]
    assert len(set(ids[:, 0].tolist())) == N - 1
    assert len(set(ids[:, 1].tolist())) == 10
    assert all(ids[i, 1] == ids[i % 10, 1] for i in range(N))


def test_batches_are_identical_for_any_number_of_workers_and_launches(shards: Path) -> None:
    """Two epochs and a half, images after augmentation included; fewer shards than workers, shards below a
    batch."""
    reference = digest(take(loader(shards), 13))
    for workers in (0, 1, 2, 5):
        assert digest(take(loader(shards, workers=workers), 13)) == reference
    assert digest(take(loader(shards, seed=6), 13)) != reference


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
def test_each_epoch_is_exact_and_each_global_batch_the_same_set_for_any_number_of_ranks(
    shards: Path, size: int
) -> None:
    whole = take(loader(shards), 3 * N // 24)
    ranks = [take(loader(shards, world=World(rank=r, size=size)), len(whole)) for r in range(size)]
    for k, batch in enumerate(whole):
        assert {len(rank[k].keys) for rank in ranks} == {24 // size}
        assert [key for rank in ranks for key in rank[k].keys] == batch.keys
        assert torch.equal(torch.cat([rank[k].images for rank in ranks]), batch.images)
    assert set(Counter(key for batch in whole for key in batch.keys).values()) == {3}


def test_a_start_in_the_middle_continues_as_if_never_stopped_with_another_batch_size_too(
    shards: Path,
) -> None:
    whole = take(loader(shards), 10)
    assert digest(take(loader(shards, workers=2), 6, start=4 * 24)) == digest(whole[4:])
    halves = take(loader(shards, batch_size=12), 12, start=4 * 24)
    assert [key for half in halves for key in half.keys] == [key for batch in whole[4:] for key in batch.keys]


def test_skipped_windows_are_jumped_over(shards: Path) -> None:
    whole = take(loader(shards), 6)
    skipped = take(loader(shards, workers=2), 4, skip=((24, 72),))
    assert digest(skipped) == digest([whole[0], *whole[3:]])
    assert [batch.next_sample for batch in skipped] == [24, 96, 120, 144]


def test_a_new_iteration_ends_the_one_before(shards: Path) -> None:
    source = loader(shards, workers=2)
    first = source.iterate(0)
    next(first)
    second = source.iterate(48)
    assert next(second).next_sample == 72
    assert list(first) == []
    assert next(second).next_sample == 96
    source.close()
    assert list(second) == []


def test_mixtures_keep_their_weights_and_say_their_epochs(shards: Path) -> None:
    config = DataConfig(
        train=(
            SourceConfig(path=str(shards / "s0.tar"), weight=3),
            SourceConfig(path=str(shards / "s3.tar"), weight=1),
        ),
        workers=0,
    )
    source = TrainLoader(
        config, preprocess=PREPROCESS, batch_size=64, world=World(), seed=1, quarantine_path=None
    )
    batches = take(source, 32)  # 2,048 draws: the mixture is exact over 4,096
    counts = Counter(key.split("/")[0] for batch in batches for key in batch.keys)
    assert abs(counts["s0.tar"] / 2048 - 0.75) < 0.04
    assert source.epochs(4096) == [3072 / 30, 1024 / 50]


def test_a_state_names_what_differs(shards: Path, tmp_path: Path) -> None:
    source = loader(shards)
    state = json.loads(json.dumps(source.state()))
    source.check_state(state)
    for key, changed in {
        "data.lanes": loader(shards, lanes=2),
        "data.window_shards": loader(shards, window_shards=1),
        "data.quantum": loader(shards, quantum=3),
        "seed": loader(shards, seed=1),
        r"data\.train \(its shards\)": loader(shards / "s0.tar"),
    }.items():
        with pytest.raises(ConfigError, match=key):
            changed.check_state(state)
    loader(shards, workers=3, batch_size=6).check_state(state)


def test_a_batch_that_ranks_cannot_share_equally_is_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size = 25: not divisible by 2 ranks; take 24"):
        loader(shards, batch_size=25, world=World(size=2))


def damaged(shards: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in shards.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shard = folder / "s3.tar"
    data = bytearray(shard.read_bytes())
    for i in (4, 9):
        data[load_index(shard).members(i)["jpg"].offset + 50] ^= 1
    shard.write_bytes(data)
    return folder


def test_bad_samples_are_replaced_and_quarantined_once_over_epochs_ranks_and_restarts(
    shards: Path, tmp_path: Path
) -> None:
    folder, log = damaged(shards, tmp_path), tmp_path / "run" / "quarantine.jsonl"
    for _ in range(2):
        for rank in range(2):
            batches = take(loader(folder, world=World(rank=rank, size=2), quarantine=log, workers=rank), 15)
            assert {len(batch.keys) for batch in batches} == {12}
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((record["shard"], record["key"]) for record in records) == [
        ("s3.tar", "0054"),
        ("s3.tar", "0059"),
    ]
    assert all("bytes are not those" in record["reason"] for record in records)


def test_batches_with_bad_samples_are_the_same_for_any_workers(shards: Path, tmp_path: Path) -> None:
    folder = damaged(shards, tmp_path)
    assert digest(take(loader(folder), 12)) == digest(take(loader(folder, workers=2), 12))


def test_too_many_bad_samples_stop_the_run(shards: Path, tmp_path: Path) -> None:
    folder = damaged(shards, tmp_path)
    with pytest.raises(DataError, match=r"data\.max_bad_fraction = 0\.0"):
        take(loader(folder, max_bad_fraction=0.0, workers=1), 10)


def test_samples_that_are_only_fetched_ahead_are_not_quarantined(shards: Path, tmp_path: Path) -> None:
    log = tmp_path / "quarantine.jsonl"
    keys = [batch.keys for batch in take(loader(shards), 6)]
    late = next(k for k in range(6) if {"s3.tar/0054", "s3.tar/0059"} & set(keys[k]))
    take(loader(damaged(shards, tmp_path), workers=2, quarantine=log), late)
    assert not log.exists()


def test_an_error_in_a_worker_arrives_as_one_line(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [Sample(f"{i}", {"jpg": b"x", "txt": b"t"}) for i in range(4)])
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^a\.tar/\d: no image in a format") as caught:
            take(loader(tmp_path, workers=workers, batch_size=2), 1)
        assert "\n" not in str(caught.value)


def test_a_killed_worker_is_a_clear_error_and_not_a_hang(shards: Path) -> None:
    source = loader(shards, workers=2)
    batches = source.iterate(0)
    next(batches)
    os.kill(source._data._workers._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"data\.workers = 2: a loader process died"):
        for _ in range(100):
            next(batches)


def test_workers_outlive_signals_and_work_beside_a_parent_with_threads(shards: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.mm(
            torch.ones(600, 600), torch.ones(600, 600)
        )  # starts the OpenMP pool that a fork does not copy
        source = loader(shards, workers=2)
        batches = source.iterate(0)
        next(batches), next(batches)  # one of each worker: both are past their start
        for worker in source._data._workers._iterator._workers:
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        assert digest([next(batches) for _ in range(12)]) == digest(take(loader(shards), 14)[2:])
        source.close()
    finally:
        torch.set_num_threads(threads)


def test_workers_end_with_their_parent(shards: Path) -> None:
    code = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[3])!r})
        import os, signal
        from clipstack.config.models import DataConfig
        from clipstack.loading.train_loader import TrainLoader
        from clipstack.preprocess import Preprocess
        from clipstack.world import World
        pre = Preprocess(image_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, context_length=12)
        config = DataConfig(train={str(shards)!r}, workers=2)
        source = TrainLoader(
            config, preprocess=pre, batch_size=8, world=World(), seed=1, quarantine_path=None
        )
        next(source.iterate(0))
        print(*[worker.pid for worker in source._data._workers._iterator._workers], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_sample_once_over_all_ranks(shards: Path, size: int, workers: int) -> None:
    loaders = [
        EvalLoader(
            str(shards), preprocess=PREPROCESS, batch_size=16, world=World(rank=r, size=size), workers=workers
        )
        for r in range(size)
    ]
    batches = [list(one) for one in loaders]
    assert {len(one) for one in batches} == {len(loaders[0])}
    rows = [
        (int(i), key, captions, int(c))
        for one in batches
        for batch in one
        for i, key, captions, c, ok in zip(
            batch.sample_index, batch.keys, batch.captions, batch.class_index, batch.mask, strict=True
        )
        if ok
    ]
    assert sorted(row[0] for row in rows) == list(range(N))
    assert all(
        key.endswith(f"{i:04}") and captions == (f"caption {i % 10}",) and c == i % 5
        for i, key, captions, c in rows
    )
    assert {len(batch.images) for one in batches for batch in one} == {16}


def test_evaluation_images_are_open_clips(shards: Path) -> None:
    batch = next(iter(EvalLoader(str(shards), preprocess=PREPROCESS, batch_size=4, world=World(), workers=0)))
    for i in range(4):
        expected = PREPROCESS.eval_image(Image.open(io.BytesIO(jpeg(i))))
        assert torch.equal(PREPROCESS.normalize(batch.images[i]), expected)


def test_evaluation_masks_and_reports_what_it_cannot_use(shards: Path, tmp_path: Path) -> None:
    source = EvalLoader(
        str(damaged(shards, tmp_path)), preprocess=PREPROCESS, batch_size=16, world=World(), workers=1
    )
    assert sum(int(batch.mask.sum()) for batch in source) == N - 2
    assert sorted(str(bad.key) for bad in source.bad) == ["0054", "0059"]


@pytest.fixture
def web(shards: Path) -> Iterator[str]:
    """The shards under a URL, without their indexes."""
    handler = type("Handler", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(shards))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_batches_that_local_ones_give(
    shards: Path, web: str, tmp_path: Path, workers: int
) -> None:
    """From a server without ranges: shards are fetched whole into the cache, ahead of use."""
    remote = loader(Path("unused"), train=f"{web}/s{{0..5}}.tar", workers=workers, cache_dir=str(tmp_path))
    assert digest(take(remote, 13)) == digest(take(loader(shards), 13))
    assert len(list((tmp_path / "shards").glob("*.tar"))) == len(SIZES)


def test_remote_evaluation_goes_through_the_cache(shards: Path, web: str, tmp_path: Path) -> None:
    config = DataConfig(train=".", cache_dir=tmp_path)
    source = EvalLoader(
        f"{web}/s{{0..5}}.tar", config=config, preprocess=PREPROCESS, batch_size=30, world=World(), workers=2
    )
    assert sum(int(batch.mask.sum()) for batch in source) == N


def piped(shards: Path, command: str = "cat", **options: object) -> TrainLoader:
    pipe = f"pipe:{command} {shards}/s3.tar"
    return loader(shards, train=pipe, batch_size=12, allow_pipe=True, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_pipes_train_through_webdataset_with_a_warning_that_says_what_is_not_exact(
    shards: Path, workers: int
) -> None:
    with pytest.warns(UnindexedWarning, match="cannot be indexed.*come again or stay away.*resuming"):
        source = piped(shards, workers=workers)
    batches = take(source, 12, start=240)
    assert {batch.images.shape for batch in batches} == {(12, 3, 16, 16)}
    assert [batch.next_sample for batch in batches] == list(range(252, 252 + 12 * 12, 12))
    assert {key.split("/")[0] for batch in batches for key in batch.keys} == {"pipe"}
    numbers = torch.tensor([int(key[-4:]) for batch in batches for key in batch.keys])
    assert set(numbers.tolist()) <= set(range(50, 100)) and len(set(numbers.tolist())) > 30
    tokens = torch.cat([batch.tokens for batch in batches])
    assert torch.equal(tokens, PREPROCESS.tokenize([f"caption {i % 10}" for i in numbers.tolist()]))


def test_pipes_differ_between_ranks_and_repeat_with_the_seed(shards: Path) -> None:
    with pytest.warns(UnindexedWarning):
        a, b = (digest(take(piped(shards), 4)) for _ in range(2))
        c = digest(
            take(
                loader(
                    shards,
                    train=f"pipe:cat {shards}/s3.tar",
                    allow_pipe=True,
                    batch_size=24,
                    world=World(rank=1, size=2),
                ),
                4,
            )
        )
    assert a == b != c


def test_a_pipe_needs_permission(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.allow_pipe = true"):
        loader(shards, train=f"pipe:cat {shards}/s3.tar")


@pytest.mark.parametrize("command", ["false", "printf x #", "true"])
def test_a_pipe_that_fails_or_gives_nothing_is_an_error_and_not_a_hang(shards: Path, command: str) -> None:
    with pytest.warns(UnindexedWarning):
        source = piped(shards, command, workers=1)
    with pytest.raises(DataError, match=r"^data\.train = 'pipe:") as caught:
        take(source, 1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="its size is unknown"):
        source.num_samples  # noqa: B018
