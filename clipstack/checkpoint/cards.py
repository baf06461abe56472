"""The model card and the data card that lie beside exported weights: what a reader must know before using
them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipstack.config import Recipe
from clipstack.config.models import DataConfig
from clipstack.errors import ClipstackError
from clipstack.run_log import EVAL_FILE, QUARANTINE_FILE, read_jsonl
from data_pipelines.errors import DataError
from data_pipelines.index.finding import ensure_index
from data_pipelines.rights import load_removal_list
from data_pipelines.sources import is_pipe, is_remote
from data_pipelines.stream import make_manifest
from data_pipelines.stream.manifest import Manifest, ShardEntry
from data_pipelines.stream.reader import removed_of

MODEL_CARD, DATA_CARD = "MODEL_CARD.md", "DATA_CARD.md"
UNKNOWN_LICENCE = "not stated"
MAX_LICENCES = 20


@dataclass(frozen=True)
class Facts:
    """What cards tell. recipe, step, samples_seen and order are None for weights of unknown origin."""

    fingerprint: str
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    num_parameters: int
    recipe: Recipe | None = None
    step: int | None = None
    samples_seen: int | None = None
    order: Mapping[str, Any] | None = None
    evaluations: tuple[Mapping[str, Any], ...] = ()
    """of the run's eval.jsonl, the last one; and files of clipstack eval --json"""
    num_quarantined: int | None = None


def model_card(facts: Facts) -> str:
    """Markdown."""
    image, text = facts.model_cfg["vision_cfg"], facts.model_cfg["text_cfg"]
    sections = [
        "---\nlibrary_name: open_clip\npipeline_tag: zero-shot-image-classification\ntags: [clip]\n---\n",
        "# Model card\n",
        "A CLIP-style pair of encoders for images and texts, trained with clipstack.\n",
        "## Use\n",
        "```python\nimport open_clip\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")\n```\n',
        "or `clipstack eval --model FOLDER ...`, `clipstack serve --model FOLDER`.\n",
        "## The model\n",
        _table(
            [
                ("fingerprint", facts.fingerprint),
                ("parameters", f"{facts.num_parameters:,}"),
                ("embedding", f"{facts.model_cfg['embed_dim']} numbers, unit-norm"),
                ("image tower", _cfg(image)),
                ("image size", str(facts.preprocess_cfg.get("size"))),
                ("text tower", _cfg(text)),
                ("context length", f"{text.get('context_length', 77)} tokens"),
            ]
        ),
        "## Training\n",
        _table(list(_training(facts))),
        "## Evaluation\n",
        _evaluations(facts.evaluations),
        "## Limits\n",
        "The model repeats what its captions say and leave out, prejudices included. It was tested only on "
        "the data above; test it on yours before you rely on it. It is not made for identifying or watching "
        "people.\n",
        f"The data are described in {DATA_CARD}.\n",
    ]
    return "\n".join(sections)


def _training(facts: Facts) -> Iterator[tuple[str, str]]:
    recipe = facts.recipe
    if recipe is None:
        yield "recipe", "not recorded"
        return
    yield "objective", recipe.objective.name
    yield "steps", f"{facts.step:,} of {recipe.train.steps:,}"
    yield "pairs seen", f"{facts.samples_seen:,}"
    yield "batch size", f"{recipe.train.batch_size:,} pairs"
    yield "optimizer", f"AdamW, lr {recipe.optim.lr:g}, weight decay {recipe.optim.weight_decay:g}"
    yield "precision", recipe.train.precision
    yield "seed", str(recipe.seed)
    if recipe.model.pretrained is not None:
        yield "started from", f"{recipe.model.name or 'tables'}, {recipe.model.pretrained}"


def _cfg(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in table.items() if not isinstance(value, dict | list))


def _evaluations(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return "None is recorded: `clipstack eval --json` measures, `clipstack export --evaluation` adds.\n"
    return "\n".join(_evaluation(one) for one in evaluations)


def _evaluation(values: Mapping[str, Any]) -> str:
    told = [("measured by", _measured_by(values))]
    told += [(name, str(values[name])) for name in ("data", "templates", "n") if values.get(name) is not None]
    numbers = [
        (name, f"{value:.4f}")
        for name, value in values.items()
        if isinstance(value, float) and name not in _NOT_METRICS
    ]
    return _table(told + numbers)


_NOT_METRICS = ("logit_scale", "inverse_penalty", "step", "n", "samples_seen")


def _measured_by(values: Mapping[str, Any]) -> str:
    return (
        f"clipstack eval, {values['task']}"
        if "task" in values
        else f"validation at step {values.get('step')}"
    )


def data_card(facts: Facts) -> str:
    """Markdown. Shards that are at hand are counted; what is not at hand is said to be so."""
    if facts.recipe is None:
        return "# Data card\n\nNothing is recorded about the data that this model was trained on.\n"
    config = facts.recipe.data
    return "\n".join(
        [
            "# Data card\n",
            "## Sources\n",
            *_sources(config, facts.order),
            "## Removals\n",
            _removals(config),
            "## Samples that could not be used\n",
            _quarantine(facts),
            "## Evaluation\n",
            f"Validation data: {_paths(config.val)}.\n",
            _evaluations(facts.evaluations),
        ]
    )


def _sources(config: DataConfig, order: Mapping[str, Any] | None) -> Iterator[str]:
    recorded = None if order is None else order.get("manifest")
    if recorded is not None:
        yield f"The shards' names and contents had SHA-256 `{recorded}`.\n"
    given = config.sources
    manifest = _manifest(given, config)
    for k, (paths, weight) in enumerate(given):
        rows = [("shards", ", ".join(paths)), ("weight", f"{weight:g}")]
        counted = _counted(manifest.sources[k].shards, config) if manifest is not None else [_NOT_AT_HAND]
        yield _table([*rows, *counted])
    if recorded is not None and manifest is not None and manifest.digest != recorded:
        yield (
            "The shards at hand when this card was written are not those of the training: the counts are of "
            "those at hand.\n"
        )


_NOT_AT_HAND = ("counts", "unknown: the shards were not at hand when this card was written")


def _manifest(given: Sequence[tuple[tuple[str, ...], float]], config: DataConfig) -> Manifest | None:
    """None where the shards are not at hand, or have no index."""
    if any(is_pipe(path) for paths, _ in given for path in paths):
        return None
    try:
        return make_manifest(given, config.cache_dir)
    except DataError:
        return None


def _counted(shards: Sequence[ShardEntry], config: DataConfig) -> Iterator[tuple[str, str]]:
    samples = sum(shard.num_samples for shard in shards)
    yield "number of shards", f"{len(shards):,}"
    yield "samples", f"{samples:,}"
    licences = Counter(licence for shard in shards for licence in _licences_of(shard))
    told = [f"{name} ({count:,})" for name, count in licences.most_common(MAX_LICENCES)]
    if licences.total() < samples:
        told.append(f"{UNKNOWN_LICENCE} ({samples - licences.total():,})")
    yield "licences", ", ".join(told)
    if config.removals is not None:
        yield "removed", _count_removed(shards, config.removals, config)


def _licences_of(shard: ShardEntry) -> list[str]:
    """Of the samples that state one, by the table beside a local shard; [] where there is none that can be
    read."""
    table = Path(shard.url).with_suffix(".parquet")
    if is_remote(shard.url) or not table.is_file():
        return []
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:  # a training machine may do without; the card then says "not stated"
        return []
    try:
        names = pq.read_schema(table).names
        column = next((name for name in ("licence", "license", "LICENSE") if name in names), None)
        if column is None:
            return []
        return [value for value in pq.read_table(table, columns=[column])[column].to_pylist() if value]
    except (OSError, pa.ArrowInvalid):
        return []


def _count_removed(shards: Sequence[ShardEntry], file: Path, config: DataConfig) -> str:
    try:
        removal = load_removal_list(file)
        removed = sum(
            len(removed_of(shard, ensure_index(shard.url, config.cache_dir), removal)) for shard in shards
        )
    except DataError as error:
        return f"unknown: {error}"
    unseen = "; URLs that KEY.json alone states are not counted" if removal.names_urls else ""
    return f"{removed:,} samples{unseen}"


def _removals(config: DataConfig) -> str:
    if config.removals is None:
        return "No removal list was in force.\n"
    try:
        removal = load_removal_list(config.removals)
    except ClipstackError:
        return f"A removal list was in force, `{config.removals}`; it was not at hand for this card.\n"
    return f"`{config.removals}` was in force: {len(removal):,} entries, SHA-256 `{removal.digest}`.\n"


def _quarantine(facts: Facts) -> str:
    if facts.num_quarantined is None:
        return "Not recorded.\n"
    return f"{facts.num_quarantined:,} lines of quarantine.jsonl: damaged, undecodable or removed.\n"


def _paths(value: object) -> str:
    if value is None:
        return "none"
    return f"`{value}`" if isinstance(value, str) else ", ".join(f"`{path}`" for path in value)  # type: ignore[attr-defined]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "\n".join(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows)
    return f"| | |\n| --- | --- |\n{body}\n"


def run_evaluations(run_dir: Path, *, step: int | None) -> tuple[Mapping[str, Any], ...]:
    """What a run's eval.jsonl says of the weights of `step`, if it does; the last line where there are
    several."""
    file = run_dir / EVAL_FILE
    found = [line for line in read_jsonl(file) if line.get("step") == step] if file.is_file() else []
    return tuple(found[-1:])


def count_quarantined(run_dir: Path) -> int:
    """Lines of a run's quarantine.jsonl; it has none where nothing was bad."""
    file = run_dir / QUARANTINE_FILE
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0
