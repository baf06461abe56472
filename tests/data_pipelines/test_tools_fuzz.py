"""Whatever bytes come: a reason or a finding, never a crash; a repair saves only what was there before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import webdataset

from data_pipelines.encode import ImageOptions, perceptual_hash, prepare_image
from data_pipelines.errors import SampleError
from data_pipelines.index.shard_index import index_path
from data_pipelines.verify import VerifyOptions, check_shard
from tests.data_pipelines.making import encoded, jpeg, picture, plain_shard

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(out))
        match rng.randrange(4):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + rng.randrange(64)] = bytes(rng.randrange(64))
            case 2:
                del out[at : at + rng.randrange(40)]
            case 3:
                out[at:at] = rng.randbytes(rng.randrange(20))
        if not out:
            return b""
    return bytes(out)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 30))])
def test_broken_images_of_every_format_are_stored_or_rejected_but_never_crash(seed: int) -> None:
    rng = random.Random(seed)
    for image_format in FORMATS:
        sound = encoded(picture(seed, 60, 50), image_format)
        for _ in range(60):
            data = mutated(sound, rng)
            try:
                stored = prepare_image(data, ImageOptions(size=32))
                perceptual_hash(stored.data)
            except SampleError as error:
                assert str(error)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 20))])
def test_a_repair_of_any_damage_saves_only_what_was_there(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    tar = tmp_path / "a.tar"
    plain_shard(tar, range(12))
    sound, index = tar.read_bytes(), index_path(tar).read_bytes()
    read = webdataset.WebDataset(str(tar), shardshuffle=False)
    originals = {s["__key__"]: (s["jpg"], s["txt"]) for s in read}
    for round_ in range(12):
        tar.write_bytes(mutated(sound, rng))
        changed = tar.read_bytes() != sound
        index_path(tar).write_bytes(index)
        saved = tmp_path / f"saved-{round_}.tar"
        found = check_shard(tar, VerifyOptions(), saved)
        assert bool(found.findings) == changed
        if found.repaired:
            after = webdataset.WebDataset(str(saved), shardshuffle=False)
            assert all(originals[s["__key__"]] == (s["jpg"], s["txt"]) for s in after)
        index_path(tar).unlink()
        check_shard(tar, VerifyOptions())


def test_random_bytes_are_no_image() -> None:
    rng = random.Random(1)
    for prefix in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF89a", b"II*\0"):
        for _ in range(30):
            with pytest.raises(SampleError):
                prepare_image(prefix + rng.randbytes(rng.randrange(400)), ImageOptions())


def test_a_jpeg_cut_anywhere_is_rejected() -> None:
    data = jpeg(1)
    for length in range(0, len(data) - 2, 7):
        with pytest.raises(SampleError):
            prepare_image(data[:length], ImageOptions())
