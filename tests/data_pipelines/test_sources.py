"""Paths and URLs to shards, over a real HTTP server that serves ranges, and the cache of whole shards."""

from __future__ import annotations

import functools
import http.server
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data_pipelines.cache import NodeShare, Prefetcher, Schedule, ShardCache, local_share
from data_pipelines.errors import DataError, ShardError
from data_pipelines.index import Sample, load_index, write_shard
from data_pipelines.index.finding import cached_index_path, ensure_index
from data_pipelines.index.shard_index import index_path
from data_pipelines.order import OrderParams
from data_pipelines.sources import RemoteFile, expand, size_bytes
from data_pipelines.stream import Reader, ReadOptions, make_manifest
from data_pipelines.stream.manifest import Manifest


@dataclass
class Server:
    """A folder under http://127.0.0.1; counts requests and bytes, and can fail on demand."""

    url: str
    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    fail_next: int = 0


class Handler(http.server.SimpleHTTPRequestHandler):
    state: Server
    ranges = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.state.requests[name] += 1
        if self.state.fail_next:
            self.state.fail_next -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range")
        if path.is_dir() or not path.exists() or wanted is None or not self.ranges:
            if path.is_file():
                self.state.sent[name] += path.stat().st_size
            super().do_GET()
            return
        data = path.read_bytes()
        low, high = wanted.removeprefix("bytes=").split("-")
        part = data[int(low) : int(high) + 1 if high else None]
        self.state.sent[name] += len(part)
        self.send_response(206 if part else 416)
        self.send_header("Content-Range", f"bytes {low}-{int(low) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    state = Server("")
    handler = type("Bound", (Handler,), {"state": state})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path / "www"))
    ) as httpd:
        state.url = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield state
        httpd.shutdown()
        thread.join()


def make_shards(folder: Path, count: int = 4, size: int = 6) -> list[str]:
    keys = []
    for shard in range(count):
        rows = [Sample(f"{i:04}", {"jpg": bytes([shard, i]) * 700, "txt": b"c"}) for i in range(size)]
        write_shard(folder / f"s{shard}.tar", rows)
        keys += [f"s{shard}.tar/{i:04}" for i in range(size)]
    return keys


def drop_indexes(folder: Path) -> None:
    for path in folder.glob("*.idx"):
        path.unlink()


def test_files_folders_braces_and_globs_name_the_same_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path)
    shards = [str(tmp_path / f"s{i}.tar") for i in range(4)]
    for source in (
        f"{tmp_path}",
        f"{tmp_path}/",
        f"{tmp_path}/s{{0..3}}.tar",
        f"{tmp_path}/s*.tar",
        f"file://{tmp_path}",
    ):
        assert expand(source) == shards
    assert expand(f"{tmp_path}/s{{2,0}}.tar") == [shards[2], shards[0]]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/s1.tar") == [shards[1]]
    assert expand("pipe:cat s{0..3}.tar") == ["pipe:cat s{0..3}.tar"]


@pytest.mark.parametrize(
    "source", ["{}/none", "{}/none*.tar", "{}/s{{0..9}}.tar", "{}/empty", "{}/s{{0..3.tar"]
)
def test_what_names_no_shard_is_refused(tmp_path: Path, source: str) -> None:
    make_shards(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        expand(source.format(tmp_path))


def test_an_unknown_protocol_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="nosuch://bucket"):
        make_manifest([(("nosuch://bucket/s0.tar",), 1.0)])


def test_a_read_only_folder_gets_its_index_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path, 1)
    shard = str(tmp_path / "s0.tar")
    expected = load_index(shard).digest
    drop_indexes(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert ensure_index(shard, tmp_path / "cache").digest == expected
    assert not index_path(shard).exists() and cached_index_path(shard, tmp_path / "cache").exists()
    assert make_manifest([((shard,), 1.0)], tmp_path / "cache").shards[0].digest == expected


def test_a_writable_folder_gets_its_index_beside_the_shard(tmp_path: Path) -> None:
    make_shards(tmp_path, 1)
    expected = load_index(tmp_path / "s0.tar").digest
    drop_indexes(tmp_path)
    ensure_index(str(tmp_path / "s0.tar"), tmp_path / "cache")
    assert load_index(tmp_path / "s0.tar").digest == expected


@pytest.mark.parametrize("indexed", [True, False])
def test_samples_are_read_from_a_url_by_ranges(tmp_path: Path, server: Server, indexed: bool) -> None:
    keys = make_shards(tmp_path / "www")
    local = Reader(make_manifest([((str(tmp_path / "www"),), 1.0)]), ReadOptions())
    if not indexed:
        drop_indexes(tmp_path / "www")
    cache = tmp_path / "cache"
    manifest = make_manifest([((f"{server.url}/s{{0..3}}.tar",), 1.0)], cache)
    assert manifest.digest == local.manifest.digest
    reader = Reader(manifest, ReadOptions(cache_dir=cache))
    server.sent.clear()
    assert [reader.read(i) for i in (3, 20)] == [local.read(i) for i in (3, 20)]
    assert reader.key(20) == keys[20]
    size = (tmp_path / "www" / "s0.tar").stat().st_size
    assert 0 < server.sent["s0.tar"] < size / 2  # a range, not the shard


def test_folders_of_a_server_are_listed(tmp_path: Path, server: Server) -> None:
    make_shards(tmp_path / "www", 2)
    assert expand(f"{server.url}/") == [f"{server.url}/s0.tar", f"{server.url}/s1.tar"]


def test_a_server_without_ranges_is_noticed(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "www", 1)
    monkeypatch.setattr(Handler, "ranges", False)
    with pytest.raises(ShardError, match="does not serve ranges"):
        RemoteFile(f"{server.url}/s0.tar").read(512, 1024)
    assert size_bytes(f"{server.url}/s0.tar") == (tmp_path / "www" / "s0.tar").stat().st_size


def test_reads_outlive_passing_failures_and_name_lasting_ones(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "www", 1)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    data = (tmp_path / "www" / "s0.tar").read_bytes()
    server.fail_next = 2
    assert RemoteFile(f"{server.url}/s0.tar").read(0, 100) == data[:100]
    server.fail_next = 99
    with pytest.raises(ShardError, match=r"s0\.tar: cannot be read after 4 attempts"):
        RemoteFile(f"{server.url}/s0.tar").read(0, 100)
    server.fail_next = 0
    with pytest.raises(ShardError, match=r"none\.tar: no such file"):
        make_manifest([((f"{server.url}/none.tar",), 1.0)], tmp_path / "cache")


def test_a_folder_of_images_is_told_how_to_become_shards(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats/a.JPG").write_bytes(b"")
    with pytest.raises(DataError, match=r"clipstack data build .* makes shards of them"):
        expand(str(tmp_path))


def test_a_misspelt_path_is_answered_with_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "val-shards").mkdir()
    with pytest.raises(DataError, match=r"no such file or folder; did you mean .*/val-shards\?"):
        expand(f"{tmp_path}/val-shard/")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nope", "data.val = 'nope': no such file or folder; name a .tar file, a folder"),
        ("n-*.tar", "data.val = 'n-*.tar': no shards there; name a .tar file, a folder"),
        ("n-{0..", "data.val = 'n-{0..': braces do not match; write"),
    ],
)
def test_the_key_of_a_wrong_source_is_named(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=re.escape(said)):
        expand(source, key="data.val")


def remote_manifest(tmp_path: Path, server: Server, count: int = 8, size: int = 6) -> Manifest:
    make_shards(tmp_path / "www", count, size)
    return make_manifest([((f"{server.url}/s{{0..{count - 1}}}.tar",), 1.0)], tmp_path / "cache")


def test_the_cache_fetches_a_shard_once_and_gives_its_bytes(tmp_path: Path, server: Server) -> None:
    manifest = remote_manifest(tmp_path, server, 2)
    cache = ShardCache(tmp_path / "cache", 10**9)
    server.requests.clear()
    for _ in range(3):
        file = cache.open(manifest.shards[1])
        assert file.read(0, 4000) == (tmp_path / "www" / "s1.tar").read_bytes()[:4000]
        file.close()
    assert server.requests["s1.tar"] == 1
    assert list(cache.held().values()) == [manifest.shards[1].size_bytes]


def test_an_open_shard_stays_readable_when_it_is_dropped(tmp_path: Path, server: Server) -> None:
    manifest = remote_manifest(tmp_path, server, 2)
    cache = ShardCache(tmp_path / "cache", 10**9)
    file = cache.open(manifest.shards[0])
    cache.drop(cache.path(manifest.shards[0]))
    assert file.read(0, 512) == (tmp_path / "www" / "s0.tar").read_bytes()[:512]
    file.close()


def test_an_evaluation_cache_stays_within_its_limit(tmp_path: Path, server: Server) -> None:
    manifest = remote_manifest(tmp_path, server, 6)
    limit = int(2.5 * manifest.shards[0].size_bytes)
    cache = ShardCache(tmp_path / "cache", limit, drops=True)
    for entry in manifest.shards:
        cache.open(entry).close()
        assert sum(cache.held().values()) <= limit


@pytest.mark.parametrize("limit_shards, lanes", [(3.2, 1), (4.5, 2)])
def test_prefetching_keeps_the_order_the_limit_and_downloads_each_shard_once_an_epoch(
    tmp_path: Path, server: Server, limit_shards: float, lanes: int
) -> None:
    manifest = remote_manifest(tmp_path, server, 12, 6)
    order = manifest.order(OrderParams(seed=3, lanes=lanes, window_shards=1))
    limit = int(limit_shards * manifest.shards[0].size_bytes)
    cache = ShardCache(tmp_path / "cache", limit)
    prefetcher = Prefetcher(cache, Schedule(manifest, order, NodeShare(batch_size=6)))
    server.requests.clear()
    for position in range(0, manifest.num_samples, 6):
        prefetcher._position = position
        prefetcher._fill(position)  # what the thread does, at a moment that the test knows
        held = cache.held()
        assert sum(held.values()) <= limit
        for sample in order.take(position, 6).sample:
            assert cache.path(manifest.shards[int(sample) // 6]) in held
    downloads = sum(server.requests[f"s{i}.tar"] for i in range(12))
    # A lane that starts inside a shard shares it with its neighbour, which reads the rest at another time.
    assert 12 <= downloads <= 12 + 4 + 2 * (lanes - 1)


def test_the_prefetch_thread_follows_training(tmp_path: Path, server: Server) -> None:
    manifest = remote_manifest(tmp_path, server, 6, 6)
    order = manifest.order(OrderParams(seed=3, lanes=1, window_shards=1))
    cache = ShardCache(tmp_path / "cache", int(2.2 * manifest.shards[0].size_bytes))
    prefetcher = Prefetcher(cache, Schedule(manifest, order, NodeShare(batch_size=6)))
    prefetcher.start(0)
    for position in (0, 18, 30):
        prefetcher.advance(position)
        wanted = cache.path(manifest.shards[int(order.take(position, 1).sample[0]) // 6])
        deadline = time.monotonic() + 20
        while not wanted.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert wanted.exists()
    prefetcher.close()


def test_a_shard_that_cannot_be_fetched_keeps_no_other_from_it(tmp_path: Path, server: Server) -> None:
    manifest = remote_manifest(tmp_path, server, 4)
    cache = ShardCache(tmp_path / "cache", 10**9)
    order = manifest.order(OrderParams(seed=3, lanes=1, window_shards=1))
    (tmp_path / "www" / manifest.shards[int(order.take(0, 1).sample[0]) // 6].name).unlink()
    Prefetcher(cache, Schedule(manifest, order, NodeShare(batch_size=6)))._fill(0)
    assert len(cache.held()) == 3


def test_aligned_lanes_let_four_machines_share_the_download(tmp_path: Path) -> None:
    make_shards(tmp_path, 64, 8)
    manifest = make_manifest([((str(tmp_path),), 1.0)])
    total = sum(entry.size_bytes for entry in manifest.shards)

    def downloaded(lanes: int, quantum: int) -> float:
        order = manifest.order(OrderParams(seed=1, lanes=lanes, window_shards=2, quantum=quantum))
        shares = [NodeShare(batch_size=32, first_rank=2 * n, num_ranks=2, world_size=8) for n in range(4)]
        needed = [{e.name for e in Schedule(manifest, order, s).upcoming(0, 10**12)} for s in shares]
        size = {entry.name: entry.size_bytes for entry in manifest.shards}
        # `upcoming` looks two epochs ahead, so look at one epoch by hand.
        used = 0
        for share, names in zip(shares, needed, strict=True):
            samples = Schedule(manifest, order, share)._samples(0, manifest.num_samples)
            one_epoch = {manifest.shards[int(i)].name for i in samples // 8}
            assert one_epoch <= names
            used += sum(size[name] for name in one_epoch)
        return used / total

    assert downloaded(lanes=16, quantum=2) <= 1.3
    assert downloaded(lanes=1, quantum=1) >= 2


def test_a_cache_too_small_for_what_is_read_side_by_side_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path, 8)
    manifest = make_manifest([((str(tmp_path),), 1.0)])
    schedule = Schedule(manifest, manifest.order(OrderParams()), NodeShare(batch_size=4))
    with pytest.raises(DataError, match=r"data\.cache_size_gb = .*raise it, or lower data\.lanes"):
        Prefetcher(ShardCache(tmp_path, 10_000), schedule)


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])  # torchrun's, deepspeed's
def test_the_share_of_a_machine_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(name, "2")
    assert local_share(64, rank=5, world_size=8) == NodeShare(64, first_rank=4, num_ranks=2, world_size=8)
