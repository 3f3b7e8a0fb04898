"""The report of a run: self-contained, honest about what is missing, safe from what models write."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lexmill.errors import FileError
from lexmill.recipe.report import write_report

HOSTILE = (
    "</script><script>alert(1)</script><!-- \u2028\u2029 <img src=http://evil.example/x onerror=alert(2)>"
)
STEPS = ("prepare", "tokenizer", "pretrain", "finetune", "evaluate", "export", "verify")


def put(path: Path, value: Any) -> None:
    """Write JSON, or one JSON object a line if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in value), "utf-8")
    else:
        path.write_text(json.dumps(value), "utf-8")


def metrics(steps: int, start: float, end: float, every: int, speed: int) -> list[dict[str, Any]]:
    """Curves that look like training."""
    noise, lines = random.Random(0), []
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-5 * step / steps)
        tokens, seconds = step * 2048, step * 2048 / speed
        lines.append(
            {
                "step": step,
                "loss": loss + noise.gauss(0, 0.07),
                "learning_rate_factor": 1 - step / steps,
                "gradient_norm": 0.8,
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": round(speed * noise.uniform(0.9, 1.05)),
            }
        )
        if step % every == 0 or step == 1:
            lines.append({"step": step, "seconds": seconds, "tokens": tokens, "validation_loss": loss + 0.05})
    return lines


def checks() -> list[dict[str, Any]]:
    """Several runtimes, with each verdict."""
    found = [
        {
            "runtime": runtime,
            "check": check,
            "passed": True,
            "figure": figure,
            "tolerance": tolerance,
            "detail": detail,
        }
        for runtime in ("transformers", "llama.cpp f32", "llama.cpp q8_0")
        for check, figure, tolerance, detail in (
            ("tokens", 0, 0, "412 texts, token by token"),
            ("logits", 3.8147e-06, 1e-4, "largest difference of a logit over 8 prompts"),
            ("greedy continuation", 64, 64, "64 of 64 tokens the same"),
        )
    ]
    found[-1] |= {"passed": False, "figure": 41, "detail": "first difference at token 42: ' was' and ' had'"}
    found.append({"runtime": "ollama", "check": "reply", "passed": None, "detail": "ollama is not installed"})
    return found


def make_run(run: Path) -> Path:
    """A run directory as a finished recipe leaves it."""
    seconds = (3.21, 4.06, 141.7, 33.4, 18.9, 1.4, 26.2)
    figures: dict[str, dict[str, Any]] = {
        "tokenizer": {"vocabulary": 2048, "bytes per token (held out)": 3.4121},
        "pretrain": {"parameters": 1_771_584, "steps": 340, "tokens": 696_320, "precision": "float32"},
        "finetune": {"steps": 200, "tokens": 409_600},
    }
    for step, took in zip(STEPS, seconds):
        outputs = {f"{step}/file.bin": {"sha256": "5f" * 32, "bytes": 1_234_567}}
        put(
            run / step / "step.json",
            {
                "step": step,
                "key": "ab" * 32,
                "code": "cd" * 32,
                "inputs": {"corpora/austen/emma.txt": "ef" * 32},
                "outputs": outputs,
                "seconds": took,
                "figures": figures.get(step, {}),
            },
        )
    (run / "recipe.toml").write_text(
        'name = "quickstart"\ndescription = "Jane Austen\'s six novels, then small talk."\n\n'
        "[pretrain]\nsteps = 340\n",
        "utf-8",
    )
    put(
        run / "prepare/manifest.json",
        {
            "counts": {
                "train": {
                    "text": {"documents": 251, "characters": 3_912_004, "bytes": 3_932_551},
                    "chat": {"documents": 412, "characters": 60_120, "bytes": 60_300},
                },
                "validation": {
                    "text": {"documents": 13, "characters": 201_003, "bytes": 202_100},
                    "chat": {"documents": 22, "characters": 3_100, "bytes": 3_140},
                },
            },
            "dropped": {"duplicate": 7},
            "files": [
                {
                    "path": f"../corpora/{name}",
                    "license": licence,
                    "language": "en",
                    "documents": 55,
                    "kept": 53,
                    "bytes": 881_220,
                    "sha256": "0a" * 32,
                }
                for name, licence in (
                    ("austen/emma.txt", "public domain"),
                    ("austen/persuasion.txt", "public domain"),
                    ("dialogues/small-talk.jsonl", "BSD-3-Clause"),
                )
            ],
        },
    )
    put(run / "pretrain/metrics.jsonl", metrics(340, 7.6, 3.6, 85, 5400))
    put(run / "finetune/metrics.jsonl", metrics(200, 3.9, 1.4, 50, 7300))
    texts = (
        "the the, and. of\nto her",
        "was a very much of the house, and she had been",
        "was not to be supposed, that Mr. Elton had been so very good",
    )
    put(
        run / "pretrain/samples.jsonl",
        [
            {"step": step, "prompt": prompt, "text": f" {text}"}
            for step, text in zip((85, 170, 340), texts)
            for prompt in ("It is a truth", "She was")
        ],
    )
    put(
        run / "finetune/samples.jsonl",
        [
            {"step": 100, "prompt": "Hello", "text": "Hello, how are you?"},
            {"step": 200, "prompt": "Who are you?", "text": "I am a very small model."},
        ],
    )
    put(
        run / "evaluate/scores.json",
        {
            "text": {
                "before": {"loss": 3.651, "perplexity": 38.51, "bits_per_byte": 1.5437, "targets": 58_112},
                "after": {"loss": 3.912, "perplexity": 49.99, "bits_per_byte": 1.6541, "targets": 58_112},
            },
            "replies": {
                "before": {"loss": 5.2, "token_accuracy": 0.113, "exact": 0.0, "conversations": 22},
                "after": {"loss": 1.9, "token_accuracy": 0.62, "exact": 0.1818, "conversations": 22},
                "seen_after": {"loss": 0.9, "token_accuracy": 0.81, "exact": 0.64, "conversations": 100},
            },
            "examples": [
                {
                    "split": "training",
                    "question": "Who are you?",
                    "expected": "I am a very small model.",
                    "before": "was the whole of the evening, and the\nwhole of her",
                    "after": "I am a very small model.",
                },
                {
                    "split": "held out",
                    "question": "What is the capital of France?",
                    "expected": "Paris is the capital of France.",
                    "before": "",
                    "after": "It is a very good thing.",
                },
            ],
        },
    )
    put(
        run / "verify.json",
        {"model": "model", "environment": {"transformers": "4.57.1"}, "checks": checks()},
    )
    put(
        run / "model/lexmill.json",
        {
            "lexmill": "ab" * 8,
            "recipe": "quickstart",
            "data_sha256": "12" * 32,
            "history": [
                {"stage": "pretrain", "objective": "causal", "steps": 340, "tokenizer_sha256": "34" * 32},
                {"stage": "finetune", "task": "chat", "steps": 200},
            ],
            "scores": {},
        },
    )
    put(
        run / "environment.json",
        {
            "cpu": "AMD EPYC 7763 64-Core Processor",
            "cpu_class": "x86-64-v3",
            "cores": 2,
            "system": "Linux",
            "python": "3.11.2",
            "packages": {"lexmill": "0.1.0", "torch": "2.9.0"},
        },
    )
    return run


class Page(HTMLParser):
    """What a browser would find: tags, text by tag, and the content of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside == "style":
            self.styles.append(data)
        else:
            self.text += data

    @property
    def charts(self) -> dict[str, Any]:
        """The data of the charts."""
        return json.loads(self.scripts[0])


def report(run: Path) -> Page:
    """The page of a run."""
    return Page(write_report(run, run / "report.html").read_text("utf-8"))


def test_a_finished_run_shows_its_figures(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "quickstart"))
    for expected in (
        "quickstart",
        "Jane Austen's six novels, then small talk.",
        "1,771,584",
        "696,320",
        "1.654",
        "3m49s",
        "8 of 10 checks equal",
        "1 different, 1 not checked",
        "ollama is not installed",
        "18.2 %",
        "It is a truth",
        "public domain",
        "AMD EPYC 7763 64-Core Processor",
        "steps = 340",
    ):
        assert expected in page.text, expected
    assert "not made" not in page.text
    assert {"pretrain-loss", "pretrain-speed", "finetune-loss", "finetune-speed"} == set(page.charts)
    for chart in page.charts.values():
        assert all(len(one["values"]) == len(chart["x"]) for one in chart["series"])
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert links <= {f"#{name}" for name in ids}


def test_hashes_are_short_and_whole_in_their_title(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"))
    assert any(attributes.get("title") == "12" * 32 for _, attributes in page.tags)
    assert "12" * 32 not in page.text


def test_a_check_that_passed_by_ties_is_shown_and_counted_apart(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = [{"runtime": "x", "check": f"c{ties}", "passed": passed, "ties": ties} for passed, ties in _TIED]
    put(run / "verify.json", {"checks": rows})
    page = report(run)
    assert "3 of 4 checks equal" in page.text and "1 of them up to ties (equal*), 1 different" in page.text
    assert page.text.count("equal*") == 4  # the tile, the count of all, that of the runtime, the row
    assert "the rounding of the runtime decides" in page.text


_TIED = ((True, 0), (True, 3), (True, 0), (False, 2))


def test_a_check_that_was_not_made_never_looks_passed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    put(
        run / "verify.json",
        {"checks": [{"runtime": "x", "check": "y", "passed": p} for p in (None, "true", 1)]},
    )
    page = report(run)
    assert "0 of 3 checks equal" in page.text and "3 not checked" in page.text
    tags = [
        attributes["class"]
        for tag, attributes in page.tags
        if "tag" in (attributes.get("class") or "").split()
    ]
    assert tags == ["tag grey"] * 3


def test_what_a_model_writes_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    put(
        run / "pretrain/samples.jsonl", [{"step": HOSTILE, "prompt": HOSTILE, "text": HOSTILE + "\ud800\x00"}]
    )
    put(
        run / "evaluate/scores.json",
        {HOSTILE: {HOSTILE: HOSTILE}, "examples": [{"question": HOSTILE, HOSTILE: HOSTILE}]},
    )
    put(
        run / "verify.json",
        {"checks": [{"runtime": HOSTILE, "check": HOSTILE, "detail": {HOSTILE: [HOSTILE]}}]},
    )
    put(
        run / "prepare/manifest.json",
        {"dropped": {HOSTILE: 1}, "files": [{"path": HOSTILE, "license": HOSTILE}]},
    )
    put(run / "model/lexmill.json", {HOSTILE: [{HOSTILE: HOSTILE}]})
    put(run / "environment.json", {"cpu": HOSTILE})
    (run / "recipe.toml").write_text(f"description = {json.dumps(HOSTILE)}\n", "utf-8")
    page = report(run)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 3
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("alert(1)") > 15
    assert "\x00" not in page.text


def test_chart_data_cannot_end_its_script(tmp_path: Path) -> None:
    from lexmill.page import script_json

    embedded = script_json({HOSTILE: HOSTILE})
    assert not re.search("[<\u2028\u2029]", embedded)
    assert json.loads(embedded) == {HOSTILE: HOSTILE}


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"))
    assert not any(
        "src" in attributes or tag in ("link", "iframe", "object") for tag, attributes in page.tags
    )
    assert not re.search(r"@import|url\(", "".join(page.styles))
    assert all(href.startswith("#") for _, attributes in page.tags if (href := attributes.get("href")))
    code = re.sub(r"/\*.*?\*/", "", "".join(page.scripts), flags=re.DOTALL)
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(", code)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy and policy.startswith("default-src 'none'")


def test_an_empty_run_says_what_is_not_made(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert page.text.count("not made") >= 18
    assert page.charts == {}
    assert len(page.scripts) == 1


@pytest.mark.parametrize(
    "missing", ["prepare", "tokenizer", "pretrain", "finetune", "evaluate", "export", "verify", "model"]
)
def test_each_missing_folder_is_said(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / missing)
    assert "not made" in report(run).text


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"x"', "[" * 100_000, "\ud800", "9" * 5000])
def test_damaged_files_are_left_out_and_named(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path / "run")
    for path in [*run.rglob("*.json"), *run.rglob("*.jsonl")]:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    page = report(run)
    assert "evaluate/scores.json" in page.text and "Damaged" in page.text


@pytest.mark.parametrize(
    "value", [None, 1, 1.5, "x", [], {}, [1], [[1]], {"a": 1}, {"a": {"a": {"a": 1}}}, [{"a": None}]]
)
def test_values_of_the_wrong_kind_do_not_matter(tmp_path: Path, value: Any) -> None:
    run = make_run(tmp_path / "run")
    for path in run.rglob("*.json"):
        put(path, dict.fromkeys(json.loads(path.read_text("utf-8")), value))
    for path in run.rglob("*.jsonl"):
        first = json.loads(path.read_text("utf-8").splitlines()[0])
        put(path, [dict.fromkeys(first, value), {"step": 1, **dict.fromkeys(list(first)[1:], value)}])
    put(
        run / "verify.json",
        {"checks": [dict.fromkeys(("runtime", "check", "passed", "figure"), value), value]},
    )
    report(run)


def test_figures_that_are_not_finite_are_left_out_of_the_curves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    put(
        run / "pretrain/metrics.jsonl",
        [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": math.inf}],
    )
    assert report(run).charts["pretrain-loss"]["x"] == [2]


def test_a_long_curve_is_thinned_but_keeps_its_ends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    put(run / "pretrain/metrics.jsonl", [{"step": step, "loss": 1.0} for step in range(1, 5001)])
    steps = report(run).charts["pretrain-loss"]["x"]
    assert (steps[0], steps[-1], len(steps)) == (1, 5000, 1500)


def test_a_cut_off_last_line_is_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with open(run / "pretrain/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 341, "lo')
    assert report(run).charts["pretrain-loss"]["x"][-1] == 340


def test_a_folder_in_the_way_is_explained(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(FileError):
        write_report(tmp_path, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert write_report(run, tmp_path / "a").read_bytes() == write_report(run, tmp_path / "b").read_bytes()


def test_torch_is_not_imported() -> None:
    code = "import sys, lexmill.recipe.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("single", [False, True], ids=["whole run", "a single point"])
def test_a_browser_draws_the_curves(tmp_path: Path, single: bool) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("chromium is not installed")
    run = make_run(tmp_path / "run")
    put(run / "pretrain/samples.jsonl", [{"step": 85, "prompt": HOSTILE, "text": HOSTILE}])
    if single:
        for stage in ("pretrain", "finetune"):
            put(run / stage / "metrics.jsonl", metrics(1, 7.6, 3.6, 1, 5400))
    page = write_report(run, tmp_path / "report.html")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count("<canvas") == 4
    legends = re.findall(r"<td class=\"u-value\">([^<]*)</td>", done.stdout)
    assert len(legends) == 12 and not {"", "--", "none yet"} & set(legends)
