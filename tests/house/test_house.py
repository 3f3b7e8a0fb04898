"""The rules of the house: who may import whom, what starts without torch, how big a file may grow."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

SOURCE = ROOT / "src" / "lexmill"
ROWS = [
    ["cli"],
    ["recipe"],
    ["serve"],
    ["evaluate", "runtimes"],
    ["pretrain", "finetune", "inference"],
    ["train"],
    ["model"],
    ["data", "tokenizer"],
    ["formats", "messages"],
    ["config", "devices", "progress"],
    ["page"],
    ["files"],
    ["errors"],
]
ROW = {room: index for index, row in enumerate(ROWS) for room in row}
# `evaluate` measures tasks, so it may use what turns their rows into targets.
TORCH = {"model", "train", "pretrain", "finetune", "evaluate"}
# `verify` drives transformers, which is torch; `doctor` measures with it.
TORCH_FILES = {
    "inference/torch_backend.py",
    "cli/doctor.py",
    "runtimes/verify_transformers.py",
    "runtimes/verify_rounding.py",
}


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE), ast.parse(path.read_text("utf-8"))


def imported(tree):
    """Names of imported modules, also inside functions, but not those for type checkers only."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            if node.module == "lexmill":
                yield from (f"lexmill.{alias.name}" for alias in node.names)


def room_of(path):
    return path.parts[0].removesuffix(".py")


def test_rooms_import_only_from_rows_below():
    wrong = []
    for path, tree in modules():
        room = room_of(path)
        if room in ("__init__", "__main__"):
            continue
        for name in imported(tree):
            parts = name.split(".")
            if parts[0] != "lexmill" or len(parts) == 1 or parts[1] == room or parts[1] not in ROW:
                continue
            if ROW[parts[1]] <= ROW[room]:
                wrong.append(f"{path} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_known():
    found = {room_of(path) for path, _ in modules()} - {"__init__", "__main__"}
    assert found <= set(ROW), found - set(ROW)


def test_torch_and_transformers_stay_in_their_rooms():
    wrong = []
    for path, tree in modules():
        names = {name.split(".")[0] for name in imported(tree)}
        if "torch" in names and room_of(path) not in TORCH and path.as_posix() not in TORCH_FILES:
            wrong.append(f"{path} imports torch")
        if "transformers" in names and not path.as_posix().startswith("runtimes/verify"):
            wrong.append(f"{path} imports transformers")
        if names & {"pickle", "dill", "cloudpickle"}:
            wrong.append(f"{path} imports pickle")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module",
    [
        "lexmill",
        "lexmill.cli.main",
        "lexmill.data.prepare",
        "lexmill.tokenizer.training",
        "lexmill.model.directory",
        "lexmill.inference.language_model",
        "lexmill.inference.native.backend",
        "lexmill.inference.native.engine",
        "lexmill.inference.native.opening",
        "lexmill.inference.explain_page",
        "lexmill.inference.explain_plot",
        "lexmill.runtimes.llama_cpp",
        "lexmill.runtimes.ollama",
        "lexmill.runtimes.ollama_api",
        "lexmill.runtimes.ollama_show",
        "lexmill.runtimes.huggingface",
        "lexmill.runtimes.verify",
        "lexmill.recipe.run",
        "lexmill.recipe.report",
        "lexmill.recipe.compare",
        "lexmill.cli.live",
    ],
)
def test_these_start_without_torch(module):
    code = f"import sys, {module}; bad = {{'torch', 'transformers', 'pyarrow'}} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_say_what_they_are_for():
    for path, tree in modules():
        assert ast.get_docstring(tree), f"{path} has no docstring"


def test_files_and_functions_stay_small():
    for path, tree in modules():
        lines = len((SOURCE / path).read_text("utf-8").splitlines())
        assert lines <= 480, f"{path} has {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = node.end_lineno - node.lineno
                assert size <= 95, f"{path}: {node.name} has {size} lines"


def test_nothing_names_a_machine():
    for path in [
        *SOURCE.rglob("*.py"),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(path for path in (ROOT / "recipes").rglob("*") if path.suffix in (".toml", ".py", ".md")),
    ]:
        text = path.read_text("utf-8")
        assert "/wo" + "rk/" not in text and "/ro" + "ot/" not in text, path
