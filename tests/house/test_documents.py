"""Documents that must not drift from the program: the command reference, links, the README's commands."""

import importlib.util
import re

import pytest
import typer
from conftest import ROOT, lexmill

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "corpora" / "README.md",
        ROOT / "examples" / "README.md",
    ]
)


def test_command_reference_is_the_program_s_own_help():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "command-line.md").read_text("utf-8") == module.reference(), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"


def commands():
    """Every line of a shell block that calls lexmill, with its page."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip().startswith("lexmill "):
                    yield pytest.param(line.split("#")[0].strip(), id=f"{page.name}: {line.strip()[:50]}")


@pytest.mark.parametrize("line", sorted(set(commands()), key=str))
def test_documented_commands_parse(line):
    """Each documented command has a verb and options that exist; those that need a run are tested in e2e."""
    import shlex

    from lexmill.cli.main import make_app

    command = typer.main.get_command(make_app())
    words = shlex.split(line)[1:]
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    options = {name for parameter in command.params for name in parameter.opts}
    for word in words:
        if word.startswith("-") and not word[1:].replace(".", "").isdigit():
            assert word in options, f"{line}: there is no option {word}"


def test_the_readme_s_two_commands_exist():
    text = (ROOT / "README.md").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for target in re.findall(r"^make ([a-z-]+)", text, re.M):
        assert target in targets
    assert lexmill("--version").stdout.startswith("lexmill 0.")
