"""The steps of a recipe for a task: labelled rows that are checked, and a model to begin with."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexmill.data.folders import find_root
from lexmill.data.forms import read_rows
from lexmill.data.labelled import KINDS_OF_TASKS, RowSettings
from lexmill.data.tables import is_pair, pair_of
from lexmill.errors import ConfigError, DataError, FileError
from lexmill.files import is_kept_copy, sha256_file, write_json
from lexmill.pretrain.shape import ShapeConfig
from lexmill.progress import Progress

if TYPE_CHECKING:
    from lexmill.finetune.config import FinetuneConfig
    from lexmill.recipe.config import Recipe

_SPLITS = ("train", "validation", "test")
_SHOWN = 5  # bad or repeated rows that are named


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """The `[rows]` table: where the labelled rows of a task lie. How they are read says `[finetune]`.

    Args:
        train: a file of rows, or two text files as "train.{en,de}.gz".
        validation: likewise; "" for a part of `train` (`finetune.validation_fraction`).
        test: likewise; what the step `evaluate` scores. "" for the validation rows.
        root: the folder that relative paths start from, itself relative to the recipe's folder or, if there is
            none, to the working directory.
    """

    train: str
    validation: str = ""
    test: str = ""
    root: str = ""

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("'train' must name a file of rows.")

    def path(self, split: str, recipe: Path) -> Path | None:
        """Where the rows of "train", "validation" or "test" lie; None where the recipe names none.

        Raises:
            FileError: `root` is no folder.
        """
        name = getattr(self, split)
        return find(name, self.root, recipe, "rows.root") if name else None


def find(name: str, root: str, recipe: Path, setting: str) -> Path:
    """A path of a recipe: from `root`, from the recipe's folder, or as it stands.

    Raises:
        FileError: `root` is no folder.
    """
    if not root:
        return recipe / name
    if folder := find_root(root, recipe):
        return folder / name
    raise FileError(
        f"{root}: there is no such folder.",
        f"Say where it lies: --set {setting}=FOLDER. The recipe's first lines tell what it needs.",
    )


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The `[base]` table: the model that fine-tuning begins with, where the recipe pretrains none.

    Args:
        path: a model directory, the run of another recipe, a directory of Hugging Face, or a GGUF file.
        root: as in `[rows]`.
        model: in place of `path`: the shape of a new model, which knows nothing yet.
        seed: of its weights.
    """

    path: str = ""
    root: str = ""
    model: ShapeConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.path) == (self.model is not None):
            raise ConfigError("[base] needs either a 'path' or a shape under [base.model].")


def files_of(path: Path) -> tuple[Path, ...]:
    """The files behind a path of rows: two for "train.{en,de}.gz"."""
    return pair_of(path) if is_pair(path) else (path,)


def named_files(recipe: Recipe, step: str) -> list[Path]:
    """The files that the step "rows" or "base" reads, as far as they are there."""
    from lexmill.inference.language_model import find_model

    if step == "rows":
        rows: RowsConfig = recipe.table("rows")
        found = [rows.path(split, recipe.base) for split in _SPLITS]
        paths = [file for path in found if path for file in files_of(path)]
    else:
        base: BaseConfig = recipe.table("base")
        source = find(base.path, base.root, recipe.base, "base.root") if base.path else None
        paths = [source] if source else []
        if source and source.is_dir():  # of a run its model, which is what `make_base` opens
            paths = sorted(find_model(source).iterdir())
    return [path for path in paths if path.is_file() and not is_kept_copy(path)]


def check_split(recipe: Recipe, out: Path, progress: Progress) -> dict[str, Any]:
    """Read all rows; write what is in them, and the hashes of their files, to `out/rows.json`.

    Raises:
        DataError: rows that cannot be used, unless `finetune.bad_rows` says "skip"; names the first ones.
    """
    from lexmill.data.check import check_rows

    config: RowsConfig = recipe.table("rows")
    settings: FinetuneConfig = recipe.table("finetune")
    train = config.path("train", recipe.base)
    found: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for split in _SPLITS:
        path = config.path(split, recipe.base)
        if path is None:
            continue
        report = check_rows(
            path,
            settings,
            KINDS_OF_TASKS[settings.task],
            against=None if split == "train" else train,
            fraction=0.0 if config.validation else settings.validation_fraction,
            seed=settings.seed,
            shown=_SHOWN,
            progress=progress,
        )
        if report.bad and settings.bad_rows == "refuse":
            raise DataError(
                f"{path}: {report.bad:,} rows cannot be used: {'; '.join(report.errors)}",
                "lexmill data check tells more. Mend them, or leave them out with finetune.bad_rows = 'skip'.",
            )
        hashes = {str(file): sha256_file(file) for file in files_of(path)}
        found[split] = report.as_json() | {"files": hashes}
        figures[f"{split} rows"] = report.rows
        for name, overlap in (("repeated", report.duplicates), ("also in training", report.leakage)):
            if overlap.rows:
                figures[f"{split} rows {name}"] = overlap.rows
    write_json(out / "rows.json", found)
    return figures


def row_texts(recipe: Recipe) -> Any:
    """All texts of the training rows, for a tokenizer to be trained on."""
    settings: FinetuneConfig = recipe.table("finetune")
    train = recipe.table("rows").path("train", recipe.base)
    for row in read_rows(train, settings, KINDS_OF_TASKS[settings.task]):
        yield from _texts(dataclasses.asdict(row) | {"origin": None, "label": None, "id": None})


def _texts(value: Any) -> Any:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            if name != "role":
                yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def make_base(recipe: Recipe, tokenizer: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Bring the model that the recipe begins with to `out/model`.

    Raises:
        FileError, ModelError: there is none, or lexmill cannot hold it.
    """
    config: BaseConfig = recipe.table("base")
    if config.path:
        from lexmill.inference.language_model import find_model
        from lexmill.runtimes.import_model import import_model

        source = find(config.path, config.root, recipe.base, "base.root")
        model = import_model(
            find_model(source) if source.is_dir() else source, out / "model", progress=progress
        )
        return {"parameters": model.config.parameters}
    from lexmill.model.build import build_model
    from lexmill.model.directory import write_model_directory
    from lexmill.tokenizer.tokenizer import Tokenizer

    words = Tokenizer.load(tokenizer)
    assert config.model is not None
    network = build_model(config.model.with_vocabulary(words.vocab_size))
    network.initialise(config.seed)
    write_model_directory(out / "model", network.config, network.weights(), words)
    return {"parameters": network.config.parameters}


def compare_on_task(recipe: Recipe, config: Any, model: Any, base: Any, progress: Progress) -> dict[str, Any]:
    """Scores of the task on the test rows, before and after: {"task": {"before"?, "after"}, "examples", "details"}.

    A base that cannot do the task at all (a head that it lacks, no chat template) has none.

    Args:
        config: a ScoreConfig.
    """
    from lexmill.errors import ModelError
    from lexmill.evaluate.scores import Scoring
    from lexmill.evaluate.task import find_scorer
    from lexmill.finetune.stage import task_data

    settings: FinetuneConfig = recipe.table("finetune")
    same = {item.name: getattr(settings, item.name) for item in dataclasses.fields(RowSettings)}
    reference = str(base.path) if base is not None else ""
    config = dataclasses.replace(config, **same, too_long=settings.too_long, reference=reference)
    kind, scorer = find_scorer(settings.task)
    where: RowsConfig = recipe.table("rows")
    train, test = (where.path(split, recipe.base) for split in ("train", "test"))
    assert train is not None
    if test is not None:
        held_out = read_rows(test, settings, kind)
    else:
        held_out = task_data(settings, train, where.path("validation", recipe.base)).rows("validation", kind)
    rows = list(itertools.islice(held_out, config.limit))
    scoring = Scoring(rows, config, progress)
    after = scorer(model, scoring)
    found: dict[str, Any] = {"task": {"after": after.metrics}, "details": after.details, "rows": after.rows}
    before: list[dict[str, str]] = []
    if base is not None:
        try:
            scores = scorer(base, scoring)
            found["task"] = {"before": scores.metrics, "after": after.metrics}
            before = scores.examples
        except ModelError as error:
            progress.say(f"  the base is not scored: {error.message}")
    found["examples"] = [
        {"split": "held out", **{key: value for key, value in one.items() if key != "given"}}
        | ({"before": before[number]["given"]} if number < len(before) and "given" in before[number] else {})
        | ({"after": one["given"]} if "given" in one else {})
        for number, one in enumerate(after.examples)
    ]
    return found
