"""The comparison of several runs: what it shows, what it says of runs that differ, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_recipe_report import HOSTILE, Page, make_run, metrics, put

from lexmill.errors import FileError
from lexmill.recipe.compare import write_comparison
from lexmill.recipe.compare_data import comparison, differences, read_runs, short_names


def plain(folder: Path, steps: int = 40, end: float = 3.0, **settings: Any) -> Path:
    """A folder as `lexmill pretrain` leaves it."""
    put(folder / "metrics.jsonl", metrics(steps, 7.0, end, 10, 5000))
    told = {"steps": steps, "rows": 8, "learning_rate": 0.003, "model": {"width": 64, "layers": 2}}
    facts = {"stage": "pretraining", "parameters": 55_488, "precision": "float32"}
    put(folder / "training.json", {**facts, "settings": {**told, **settings}})
    (folder / "model").mkdir(exist_ok=True)
    return folder


def page_of(*folders: Path) -> Page:
    out = folders[0].parent / "compare.html"
    return Page(write_comparison(read_runs(folders), out).read_text("utf-8"))


def data_of(page: Page) -> dict[str, Any]:
    return json.loads(page.scripts[0])


def test_two_runs_are_drawn_over_one_another_and_the_best_is_marked(tmp_path: Path) -> None:
    page = page_of(plain(tmp_path / "narrow"), plain(tmp_path / "wide", end=2.5, model={"width": 128}))
    assert "narrow and wide" in page.text and "55,488" in page.text
    assert "the lowest validation loss is 2.5" in page.text and "of wide at step 40" in page.text
    assert [attributes.get("class") for tag, attributes in page.tags if tag == "strong"] == ["best"] * 2
    charts = {chart["name"]: chart for chart in data_of(page)["charts"]}
    wanted = ("loss", "validation_loss", "tokens_per_second", "gradient_norm", "learning_rate_factor")
    assert set(charts) == {f"pretrain-{name}" for name in wanted}
    for table in data_of(page)["tables"]["pretrain"]:
        for steps, tokens, seconds, values, means in table["columns"].values():
            assert len(steps) == len(tokens) == len(seconds) == len(values) > 0
            assert means is None or len(means) == len(steps)
    holders = {attributes["data-chart"] for _, attributes in page.tags if "data-chart" in attributes}
    assert holders == set(charts)


def test_the_page_needs_no_other_file_and_what_runs_hold_stays_text(tmp_path: Path) -> None:
    first, second = plain(tmp_path / "a&b<i>"), plain(tmp_path / "c", optimizer=HOSTILE)
    put(
        first / "metrics.jsonl",
        [*metrics(20, 7, 3, 5, 100), {"step": 9, "spike": 9.0, "documents": [HOSTILE, 3]}],
    )
    page = page_of(first, second)
    assert not any("src" in a or tag in ("link", "iframe", "img", "i>") for tag, a in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert len(page.scripts) == 3 and "a&b<i>" in page.text and "alert(1)" in page.text
    code = re.sub(r"/\*.*?\*/", "", "".join(page.scripts), flags=re.DOTALL)
    assert not re.search(r"https?://(?!evil)|fetch\(|XMLHttpRequest|import\(", code)
    assert not re.search(r"@import|url\(", "".join(page.styles))


def test_only_settings_that_differ_are_told(tmp_path: Path) -> None:
    runs = read_runs([plain(tmp_path / "a"), plain(tmp_path / "b", learning_rate=0.01, track=["wandb"])])
    assert differences(runs) == {"pretrain.learning_rate": [0.003, 0.01]}
    assert comparison(runs)["differences"] == {"pretrain.learning_rate": {"a": 0.003, "b": 0.01}}


def test_a_setting_that_an_old_run_does_not_name_is_no_difference(tmp_path: Path) -> None:
    """Runs from before `training.json` only have their recipe, which leaves defaults out."""
    old, new = make_run(tmp_path / "old"), plain(tmp_path / "new", steps=40)
    assert differences(read_runs([old, new])) == {"pretrain.steps": [340, 40]}
    other = make_run(tmp_path / "other")
    (other / "recipe.toml").write_text(
        'name = "x"\n[pretrain]\nsteps = 340\nrows = 4\n[tokenizer]\nvocab_size = 9\n'
    )
    assert differences(read_runs([old, other])) == {"pretrain.rows": [None, 4]}


def test_both_stages_of_finished_runs_are_compared(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert {chart["stage"] for chart in data_of(page)["charts"]} == {"pretrain", "finetune"}
    assert "1,771,584" in page.text and "In no setting that is known of them" in page.text


def test_a_step_at_work_is_found_in_its_work_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    put(run / ".work/finetune/finetune/metrics.jsonl", metrics(7, 5, 4, 5, 100))
    rows = comparison(read_runs([run]))["runs"]
    assert [(row["stage"], row["steps"], row["in_progress"]) for row in rows] == [
        ("pretrain", 340, False),
        ("finetune", 7, True),
    ]
    assert "in progress" in page_of(run, plain(tmp_path / "other")).text


def test_a_plain_folder_is_known_for_what_wrote_it(tmp_path: Path) -> None:
    tuned = plain(tmp_path / "x")
    put(tuned / "training.json", {"stage": "fine-tuning"})
    old = plain(tmp_path / "y")
    (old / "training.json").unlink()
    put(old / "model/lexmill.json", {"history": [{"stage": "pretrain"}, {"stage": "finetune"}]})
    assert [row["stage"] for row in comparison(read_runs([tuned, old]))["runs"]] == ["finetune"] * 2


def test_spikes_and_skipped_steps_are_marked_and_do_not_lift_the_curve(tmp_path: Path) -> None:
    lines = []
    for line in metrics(200, 3.0, 3.0, 50, 100):
        if line["step"] == 100 and "loss" in line:
            line["loss"] = 90.0
        if line["step"] == 150 and "loss" in line:
            lines.append({"step": 150, "skipped": 1, "documents": [4]})
            line["loss"] = float("nan")
        lines.append(line)
        if line["step"] == 100 and "gradient_norm" in line:
            lines.append({"step": 100, "spike": 90.0, "documents": list(range(9))})
        if line["step"] == 180 and "gradient_norm" in line:  # as it was told before
            line["gradient_norm"] = float("inf")
    folder = plain(tmp_path / "a")
    put(folder / "metrics.jsonl", lines)
    page = page_of(folder, plain(tmp_path / "b"))
    table = data_of(page)["tables"]["pretrain"][0]
    assert [(mark["kind"], mark["at"][0]) for mark in table["marks"]] == [
        ("spike", 100),
        ("skipped", 150),
        ("skipped", 180),
    ]
    assert "the loss jumped to 90.000; documents: no. 0, no. 1" in table["marks"][0]["text"]
    assert "and 3 more" in page.text and table["marks"][0]["y"] < 4
    means = [mean for mean in table["columns"]["loss"][4] if mean is not None]
    assert max(means) < 4


def test_documents_are_called_by_their_source_where_the_run_holds_them(tmp_path: Path, documents) -> None:
    run = make_run(tmp_path / "run")
    for name in ("train.parquet", "manifest.json"):
        (run / "prepare" / name).write_bytes((documents / name).read_bytes())
    put(
        run / "pretrain/metrics.jsonl",
        [*metrics(20, 5, 4, 5, 9), {"step": 9, "spike": 9.0, "documents": [0, 10**6]}],
    )
    text = page_of(run, plain(tmp_path / "b")).text
    assert "novel.txt#" in text and "no. 1,000,000" in text


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda folder: None, "there is no such folder"),
        (lambda folder: folder.write_text("x"), "is a file, not a folder"),
        (lambda folder: folder.mkdir(), "there is no metrics.jsonl in it, nor in its pretrain/"),
        (lambda folder: put(folder / "metrics.jsonl", []), "holds no step yet"),
        (lambda folder: put(folder / "metrics.jsonl", [{"step": 1, "loss": "x"}]), "holds no step yet"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, make, said: str) -> None:
    make(tmp_path / "bad")
    with pytest.raises(FileError, match=re.escape(said)):
        read_runs([plain(tmp_path / "good"), tmp_path / "bad"])


def test_a_run_given_twice_is_refused_however_it_is_spelled(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    for again in (run, tmp_path / "x" / ".." / "run", tmp_path / "link", run / "pretrain"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(FileError, match="given twice"):
            read_runs([run, again])


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one/run", "two/run", "three", "four/pretrain")]
    assert short_names(paths) == ["one/run", "two/run", "three", "four/pretrain"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "9" * 5000])
def test_damaged_files_beside_the_metrics_do_not_matter(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path / "run")
    for path in [*run.rglob("*.json"), run / "recipe.toml", run / "finetune/metrics.jsonl"]:
        path.write_text(content)
    page_of(run, plain(tmp_path / "b"))


def test_many_runs_have_lines_of_their_own(tmp_path: Path) -> None:
    page = page_of(*(plain(tmp_path / f"run-{number}") for number in range(14)))
    assert "14 runs" in page.text
    swatches = [
        attributes["class"]
        for _, attributes in page.tags
        if (attributes.get("class") or "").startswith("swatch")
    ]
    assert len(set(swatches)) == 14
