"""Recipes: what is read, what is refused, and how the refusal reads."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipstack.config import Recipe, load_recipe, parse_recipe, to_toml
from clipstack.config.help import help_config, walk_fields
from clipstack.errors import ConfigError
from clipstack.recipes import shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = 'model = "ViT-B-32"\n[data]\ntrain = "x.tar"\n[train]\nsteps = 10\nbatch_size = 8\n'


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(SMALLEST, encoding="utf-8")
    return path


def test_overrides_set_numbers_tables_and_plain_strings(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "optim.lr=1e-4",
            'objective={name="hard_negative", beta=0.5}',
            "run.dir=runs/x",
            "data.val=/data/val-{0..3}.tar",
            "model=ViT-B-16",
            "data.train=['a.tar', 'b.tar']",
            "train.ema_decay=none",
        ],
    )
    assert recipe.train.ema_decay is None
    assert recipe.optim.lr == 1e-4
    assert recipe.objective.name == "hard_negative" and recipe.objective.beta == 0.5
    assert recipe.run.dir == Path("runs/x")
    assert recipe.data.val == "/data/val-{0..3}.tar"
    assert recipe.model.name == "ViT-B-16"
    assert recipe.data.train == ("a.tar", "b.tar")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"optim\.learning_rate: unknown key"),
        ("optim.lrr=1", r"optim\.lrr: unknown key; did you mean optim\.lr\?"),
        ("train.steps=many", r"train\.steps = 'many': "),
        ("train.steps=0", r"train\.steps = 0: "),
        ("train.batch_size=8.5", r"train\.batch_size = 8\.5: "),
        ("model={embed_dim=8}", r"model: .*give name"),
        ("seed", r"override 'seed': write it as key=value"),
        ("train.steps.more=1", r"override train\.steps\.more: steps is 10"),
        ('objective={name="clipp"}', r"objective"),
        ('objective={name="hard_negative", beta=-1}', r"objective.*beta = -1"),
        ('objective={name="clip", image_image=true}', r"^objective\.image_image: the trainer makes one view"),
        ("optim.betas=[0.9, 1.0]", r"optim\.betas\.1 = 1\.0: "),
        ("data.augment.crop_scale=[0.0, 1.0]", r"data\.augment\.crop_scale\.0 = 0\.0: "),
        ("data.augment.crop_scale=[1.0, 0.9]", r"data\.augment: crop_scale = \[1, 0\.9\]: give the smaller"),
        ("data.augment.crop_ratio=[-1, 1]", r"data\.augment\.crop_ratio\.0 = -1: "),
        ("data.augment.color_jitter=[1, 1, 1, 0.6]", r"data\.augment\.color_jitter\.3 = 0\.6: "),
        ("train.steps=none", r"train\.steps = None: "),
    ],
)
def test_wrong_values_are_named_in_one_line(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe_file, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["model = ", "\xff".encode("latin-1")])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"bad\.toml: not"):
        load_recipe(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(tmp_path / "none.toml")


def test_the_shipped_recipes_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["data.train=x"]
    assert load_recipe("configs/cifar10.toml", overrides) == load_recipe(
        shipped_recipes()["cifar10"], overrides
    )
    with pytest.raises(ConfigError, match=r"configs/cifar9\.toml: no such file.*configs/cifar10\.toml"):
        load_recipe("configs/cifar9.toml")


def test_a_recipe_of_the_working_directory_comes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    shipped = shipped_recipes()["cifar10"].read_text()
    (tmp_path / "configs/cifar10.toml").write_text(shipped.replace("seed = 0", "seed = 77"))
    assert load_recipe("configs/cifar10.toml").seed == 77


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    lr=st.floats(1e-8, 1.0),
    seed=st.integers(0, 2**31 - 1),
    clip=st.booleans(),
)
def test_a_recipe_survives_being_written_and_read(text: str, lr: float, seed: int, clip: bool) -> None:
    table = tomllib.loads(SMALLEST) | {
        "seed": seed,
        "optim": {"lr": lr},
        "data": {"train": text, "augment": {"hflip": clip, "color_jitter": [0.1, 0.2, 0.3, 0.0]}},
        "objective": {"name": "clip"} if clip else {"name": "hard_negative", "beta": lr},
        "model": {"embed_dim": 8, "vision_cfg": {"image_size": 8, "a key": text}, "text_cfg": {"width": 8}},
    }
    recipe = parse_recipe(table)
    assert parse_recipe(tomllib.loads(to_toml(recipe))) == recipe


def test_every_field_says_what_it_means() -> None:
    tables = {"run", "model", "objective", "data", "train", "optim", "checkpoint", "eval", "log", "guard"}
    silent = {key for key, info in walk_fields(Recipe) if not info.description}
    assert silent <= tables
    shown = help_config()
    assert "train.batch_size (required)" in shown
    for line in ('run.dir = "runs/run"', "model.name (not set)", "model.compile = false"):
        assert line in shown
    assert all(line.strip() for line in shown.splitlines()), "a key without a meaning"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_open_with_their_command(path: Path) -> None:
    load_recipe(path)
    assert f"--config configs/{path.name}" in path.read_text(encoding="utf-8").split("\n\n")[0]
