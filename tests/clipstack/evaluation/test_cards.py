"""The cards tell what is recorded and what is at hand, and say so where something is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipstack.checkpoint.cards import Facts, data_card, model_card
from clipstack.config import parse_recipe
from data_pipelines.stream import make_manifest
from tests.clipstack.evaluation.conftest import MODEL


def facts(train: object, **data: object) -> Facts:
    recipe: dict[str, Any] = {
        "model": MODEL,
        "data": {"train": train, **data},
        "train": {"steps": 10, "batch_size": 8},
    }
    return Facts(
        fingerprint="f" * 32,
        model_cfg=MODEL,
        preprocess_cfg={"size": [16, 16]},
        num_parameters=1234,
        recipe=parse_recipe(recipe),
        step=10,
        samples_seen=80,
        evaluations=({"step": 10, "samples_seen": 80, "n": 100, "top1": 0.25},),
        num_quarantined=2,
    )


@pytest.fixture
def shards(benchmark_folder: Path, tmp_path: Path) -> Path:
    """40 and 37 samples; of the first shard 30 state a licence."""
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes((benchmark_folder / "test" / name).read_bytes())
    licences = ["CC-BY-4.0"] * 20 + ["CC0"] * 10 + [None] * 10
    pq.write_table(
        pa.table({"key": [str(i) for i in range(40)], "licence": licences}), tmp_path / "0.parquet"
    )
    return tmp_path


def test_the_data_card_counts_samples_licences_and_removals(shards: Path) -> None:
    removals = shards / "removals.txt"
    removals.write_text("key:0.tar/s0000003\nkey:1.tar/s0000041\nkey:1.tar/nobody\n")
    card = data_card(facts(str(shards), removals=str(removals)))
    assert "| samples | 77 |" in card and "| number of shards | 2 |" in card
    assert "CC-BY-4.0 (20), CC0 (10), not stated (47)" in card
    assert "| removed | 2 samples |" in card and "3 entries" in card
    assert "2 lines of quarantine.jsonl" in card and "| top1 | 0.2500 |" in card


def test_removals_by_url_count_where_the_table_knows_the_url(shards: Path) -> None:
    table = {"key": ["s0000001", "s0000002"], "url": ["https://x.org/1", "https://x.org/2"]}
    pq.write_table(pa.table(table), shards / "0.parquet")
    removals = shards / "removals.txt"
    removals.write_text("url:https://x.org/2\nkey:0.tar/s0000003\n")
    assert "| removed | 2 samples; URLs" in data_card(facts(str(shards), removals=str(removals)))


def test_each_source_of_a_mixture_is_told(shards: Path) -> None:
    sources = [{"path": str(shards / "0.tar"), "weight": 2.0}, {"path": str(shards / "1.tar")}]
    card = data_card(facts(sources))
    assert "| samples | 40 |" in card and "| samples | 37 |" in card and "| weight | 2 |" in card


def test_what_is_not_at_hand_is_said_to_be_so(shards: Path) -> None:
    assert "not at hand" in data_card(facts(str(shards / "gone.tar"), removals=str(shards / "gone.txt")))
    (shards / "0.parquet").write_bytes(b"damaged")
    assert "not stated (77)" in data_card(facts(str(shards)))
    given = facts(str(shards))
    now = make_manifest([((str(shards),), 1.0)]).digest
    assert "not those" not in data_card(Facts(**{**given.__dict__, "order": {"manifest": now}}))
    assert "not those of the training" in data_card(
        Facts(**{**given.__dict__, "order": {"manifest": "0" * 64}})
    )


def test_the_model_card_tells_of_the_training(shards: Path) -> None:
    card = model_card(facts(str(shards)))
    for told in ("1,234", "| objective | clip |", "| steps | 10 of 10 |", "| pairs seen | 80 |", "step 10"):
        assert told in card
    bare = Facts(fingerprint="f" * 32, model_cfg=MODEL, preprocess_cfg={}, num_parameters=1)
    assert "| recipe | not recorded |" in model_card(bare) and "Nothing is recorded" in data_card(bare)
