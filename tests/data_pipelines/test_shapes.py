"""The procedural data set: what must never be in training, what the probes ask, reproducible bytes."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.shapes import captions, generate, pictures, scenes, splits
from data_pipelines.tar import Member, walk

NUM_TRAIN, NUM_TEST = 600, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes") / "set"
    generate(out, num_train=NUM_TRAIN, num_test=NUM_TEST)
    return out


def samples(folder: Path, split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    found: dict[str, dict[str, bytes]] = {}
    for tar in sorted(folder.glob(f"{split}-*.tar")):
        with tar.open("rb") as stream:
            for member in walk(stream):
                assert isinstance(member, Member)
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = member.payload
    yield from found.items()


def records(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(members["json"]) for _, members in samples(folder, split)]


def pairs_named(caption: str) -> set[tuple[str, str]]:
    """Every (colour, shape) that a caption names side by side, whatever the synonym."""
    canonical = {name: shape for shape in scenes.SHAPES for name in captions.SYNONYMS[shape]}
    pattern = rf"\b({'|'.join(scenes.COLOURS)}) ({'|'.join(canonical)})\b"
    return {(colour, canonical[name]) for colour, name in re.findall(pattern, caption)}


def test_no_held_out_pair_is_in_a_training_image_or_caption(folder: Path) -> None:
    held_out = set(scenes.HELD_OUT)
    drawn, named = set(), set()
    for record in records(folder, "train") + records(folder, "val"):
        drawn |= {(thing["colour"], thing["shape"]) for thing in record["things"]}
        captions = record["captions"] + record["first_captions"]
        named |= {pair for caption in captions for pair in pairs_named(caption)}
    assert not drawn & held_out
    assert not named & held_out
    assert (
        drawn == named == set(scenes.TRAINED)
    )  # the check above would see a held-out pair if there were one


def test_no_held_out_pair_is_in_thirty_thousand_scenes_of_the_default_seed() -> None:
    drawn = {thing.pair for index in range(30_000) for thing in splits.train_scene(0, index).things}
    assert drawn == set(scenes.TRAINED)


def test_every_thing_of_the_test_splits_wears_a_held_out_pair(folder: Path) -> None:
    for split in ("test", "single"):
        pairs = {(t["colour"], t["shape"]) for record in records(folder, split) for t in record["things"]}
        assert pairs == set(scenes.HELD_OUT)


def test_no_colour_and_no_shape_is_held_out_twice() -> None:
    assert len({colour for colour, _ in scenes.HELD_OUT}) == len(scenes.HELD_OUT) == 6
    assert len({shape for _, shape in scenes.HELD_OUT}) == 6


def test_colour_swapped_captions_name_only_trained_pairs(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "probes.jsonl").read_text().splitlines()]
    binding = [row for row in rows if row["kind"] == "binding"]
    assert len(binding) == NUM_TEST
    for row in binding:
        true, (swapped,) = row["caption"], row["negatives"]
        assert pairs_named(true) <= set(scenes.HELD_OUT)
        assert pairs_named(swapped) <= set(scenes.TRAINED)
        assert sorted(true.split()) == sorted(swapped.split())


def test_probes_ask_for_the_samples_caption_against_others(folder: Path) -> None:
    text = {key: members["txt"].decode() for key, members in samples(folder, "test")}
    negatives: dict[str, set[int]] = {}
    for line in (folder / "probes.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["caption"] == text[row["image"]]
        assert len({row["caption"], *row["negatives"]}) == 1 + len(row["negatives"])
        negatives.setdefault(row["kind"], set()).add(len(row["negatives"]))
    assert negatives == {
        "colour in pair": {len(scenes.COLOURS) - 1},
        "shape in pair": {len(scenes.SHAPES) - 1},
        "size in pair": {len(scenes.SIZES) - 1},
        "background": {len(scenes.BACKGROUNDS) - 1},
        "relation": {3},
        "order": {1},
        "binding": {1},
    }


def test_test_scenes_all_differ_even_when_told_the_other_way_round() -> None:
    doubles = splits.held_out_doubles(5, 1000)
    told = {captions.full_caption(scene) for scene in doubles}
    told |= {captions.full_caption(scenes.inverted(scene)) for scene in doubles}
    assert len(told) == 2 * len(doubles)


def test_more_test_scenes_than_can_differ_are_refused() -> None:
    with pytest.raises(DataError, match="--num-test 1201: only 1200"):
        splits.held_out_doubles(0, 1201)
    assert len(splits.held_out_doubles(0, 1200)) == 1200


def test_equal_arguments_give_equal_bytes_and_another_seed_does_not(folder: Path, tmp_path: Path) -> None:
    generate(tmp_path / "again", num_train=NUM_TRAIN, num_test=NUM_TEST)
    generate(tmp_path / "other", num_train=NUM_TRAIN, num_test=NUM_TEST, seed=1)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    train, other = folder / "train-00000.tar", tmp_path / "other" / "train-00000.tar"
    assert train.read_bytes() != other.read_bytes()


def test_a_thing_lies_in_its_own_cell_and_shows_its_colour(folder: Path) -> None:
    for _, members in samples(folder, "single"):
        thing = json.loads(members["json"])["things"][0]
        image = np.asarray(Image.open(io.BytesIO(members["png"])), dtype=float)  # (60, 60, 3)
        distance = np.abs(image - np.median(image, axis=(0, 1))).sum(-1)
        rows, columns = np.nonzero(distance > 60)
        column, row = scenes.PLACES[thing["place"]]
        assert set(columns // pictures.CELL_PX) == {column}
        assert set(rows // pictures.CELL_PX) == {row}
        brightest = image.reshape(-1, 3)[distance.ravel().argmax()]
        nearest = min(scenes.COLOURS, key=lambda c: np.abs(brightest - np.array(scenes.COLOURS[c])).sum())
        assert nearest == thing["colour"]


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_every_shape_and_size_covers_what_it_should(shape: str) -> None:
    area = {  # of diameter 1, where the formula is plain
        "circle": np.pi / 4,
        "square": 0.9**2,
        "triangle": 0.5 * 1.85 / 2,
        "cross": 2 * 0.32 - 0.32**2,
        "ring": np.pi / 4 * (1 - 0.55**2),
    }
    small, large = (pictures._mask(shape, diameter).sum() for diameter in scenes.SIZES.values())
    expected = (scenes.SIZES["large"] / scenes.SIZES["small"]) ** 2
    assert large / small == pytest.approx(expected, rel=0.06)
    if shape in area:
        assert large == pytest.approx(area[shape] * scenes.SIZES["large"] ** 2, rel=0.06)


def test_relations_follow_from_the_cells() -> None:
    for relation, (across, down) in {"left of": (-1, 0), "above": (0, -1)}.items():
        (x, y), (u, v) = (scenes.PLACES[place] for place in scenes.RELATIONS[relation])
        assert (np.sign(x - u), np.sign(y - v)) == (across, down)
        assert scenes.RELATIONS[scenes.INVERSE[relation]] == scenes.RELATIONS[relation][::-1]


def test_two_things_stand_where_their_relation_says(folder: Path) -> None:
    doubles = [record for record in records(folder, "train") if record["relation"]]
    assert doubles
    for record in doubles:
        places = tuple(thing["place"] for thing in record["things"])
        assert places == scenes.RELATIONS[record["relation"]]
        assert len({thing["colour"] for thing in record["things"]}) == 2
        assert len({thing["shape"] for thing in record["things"]}) == 2


def test_classes_and_labels_agree_with_the_pictures(folder: Path) -> None:
    names = (folder / "classnames.txt").read_text().splitlines()
    labels = json.loads((folder / "labels.json").read_text())
    prompts = json.loads((folder / "prompts.json").read_text())
    for key, members in samples(folder, "single"):
        thing = json.loads(members["json"])["things"][0]
        assert (
            names[int(members["cls"])]
            == f"{thing['colour']} {thing['shape']}"
            == labels[key]["colour x shape"]
        )
        for factor, classes in prompts.items():
            assert labels[key][factor] in classes


def test_first_captions_tell_of_two_things_only_their_colours_and_who_stands_where(folder: Path) -> None:
    known = {
        *scenes.COLOURS,
        *captions.SYNONYMS["shape"],
        *["a", "an", "to", "the", "left", "right", "of", "above", "over", "below", "under"],
    }
    doubles = [record for record in records(folder, "train") if record["relation"]]
    for record in doubles:
        first, second = (thing["colour"] for thing in record["things"])
        for caption in record["first_captions"]:
            told, _, ground = caption.partition(" on ")
            words = told.split()
            assert set(words) <= known and ground in {
                "",
                f"a {record['background']} background",
                record["background"],
            }
            colours = [word for word in words if word in scenes.COLOURS]
            relation = next(
                name for name in scenes.RELATIONS for said in captions.SYNONYMS[name] if f" {said} " in told
            )
            assert (colours, relation) in (
                ([first, second], record["relation"]),
                ([second, first], scenes.INVERSE[record["relation"]]),
            )
    assert len(doubles) > 50


def test_every_caption_is_short(folder: Path) -> None:
    told = [record[name] for record in records(folder, "train") for name in ("captions", "first_captions")]
    longest = max(len(caption.split()) for captions in told for caption in captions)
    assert longest + 2 <= 24  # each word is one token of the CLIP tokenizer; start and end are added


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0}, "--num-train 0"),
        ({"num_test": -1}, "--num-test -1"),
        ({"seed": 3, "test_seed": 3}, "--test-seed 3"),
    ],
)
def test_unusable_arguments_are_named(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        generate(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_an_output_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(DataError, match=f"--output {tmp_path / 'x'}"):
        generate(tmp_path / "x", num_train=10, num_test=10)
