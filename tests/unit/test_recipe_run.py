"""The recipe's bookkeeping, with steps that do nothing: what is owed after a kill, and how often files are read."""

import dataclasses

import pytest
from conftest import ROOT

from lexmill.recipe import plan as planning
from lexmill.recipe import run as running
from lexmill.recipe.config import read_recipe

RECIPE = read_recipe(ROOT / "recipes" / "quickstart.toml")


@pytest.fixture
def life(monkeypatch, tmp_path):
    """All steps replaced by ones that write a line; `life.done` says which ran, `life.killed_in` where to die."""

    class Life:
        def __init__(self):
            self.done, self.killed_in, self.out = [], "", tmp_path / "run"

        def run(self, **options):
            self.done.clear()
            running.run(RECIPE, self.out, **options)
            return list(self.done)

        def left(self, start=None):
            return [one.step for one in planning.make_plan(RECIPE, self.out, start) if one.reason]

    life = Life()

    def make(step, kind):
        def work(place):
            if life.killed_in == step:
                raise KeyboardInterrupt
            life.done.append(step)
            for name in kind.publish:
                path = place.work / name
                if "." not in name:
                    path.mkdir(parents=True)
                    path = path / "result"
                path.write_text("x" * 1000)
            return {}

        return dataclasses.replace(kind, make=work)

    kinds = {step: make(step, kind) for step, kind in planning.STEP_KINDS.items()}
    monkeypatch.setattr(planning, "STEP_KINDS", kinds)
    monkeypatch.setattr(running, "STEP_KINDS", kinds)
    return life


def test_from_runs_the_step_and_all_that_need_it(life):
    assert life.run() == list(RECIPE.steps)
    assert life.run() == []
    wanted = ["export", "verify", "report"]
    assert life.left("export") == wanted and life.run(start="export") == wanted
    assert life.run() == [] and life.left() == []


@pytest.mark.parametrize("step", ["finetune", "evaluate", "report"])
def test_a_run_killed_after_from_still_owes_its_steps(life, step):
    life.run()
    wanted = ["finetune", "evaluate", "export", "verify", "report"]
    life.killed_in = step
    with pytest.raises(KeyboardInterrupt):
        life.run(start="finetune")
    life.killed_in = ""
    left = wanted[wanted.index(step) :]
    assert life.left() == left
    assert life.run() == left
    assert life.run() == []


def test_owed_steps_add_up(life):
    life.run()
    life.killed_in = "verify"
    with pytest.raises(KeyboardInterrupt):
        life.run(start="verify")
    life.killed_in = "evaluate"
    with pytest.raises(KeyboardInterrupt):
        life.run(start="evaluate")
    life.killed_in = ""
    assert life.run() == ["evaluate", "export", "verify", "report"]


def test_a_file_is_hashed_once_a_run(life, monkeypatch):
    read = []
    real = planning.sha256_file
    monkeypatch.setattr(planning, "sha256_file", lambda path: read.append(str(path)) or real(path))
    planning._hash_of.cache_clear()
    life.run()
    life.run(start="verify")
    # `prepare` is hashed when it is done, as every output, and never again though each step plans anew
    assert read and {path: read.count(path) for path in read if read.count(path) > 1} == {
        str(life.out / name): 2 for name in ("verify.json", "report.html")
    }


def test_a_changed_file_is_hashed_again(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    first = planning.content_hash(path)
    path.write_text("two")
    assert planning.content_hash(path) != first
    (tmp_path / "b").write_text("one")
    (tmp_path / "b").replace(path)
    assert planning.content_hash(path) == first
