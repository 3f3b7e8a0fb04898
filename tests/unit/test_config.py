"""Configuration: types, suggestions, overrides, and a recipe that survives being written and read."""

from dataclasses import dataclass

import pytest
from conftest import ROOT

from lexmill.config import apply_overrides, from_mapping, read_toml, to_mapping
from lexmill.errors import ConfigError, FileError
from lexmill.recipe.config import read_recipe, to_toml
from lexmill.train.config import TrainConfig

QUICKSTART = ROOT / "recipes" / "quickstart.toml"


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    maybe: int | None = None


def test_tables_become_dataclasses_and_back():
    outer = from_mapping(Outer, {"name": "x", "inner": {"rate": 2}, "many": [{"size": 3}], "maybe": 4}, "r")
    assert outer == Outer(name="x", inner=Inner(rate=2.0), many=(Inner(size=3),), maybe=4)
    assert from_mapping(Outer, to_mapping(outer), "r") == outer


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nam": "x"}, "unknown key 'nam'. Did you mean 'name'"),
        ({}, "the key 'name' is missing"),
        ({"name": 3}, r"r.name: expected a string, found a whole number \(3\)"),
        ({"name": "x", "inner": {"size": "big"}}, "r.inner.size: expected a whole number"),
        ({"name": "x", "inner": {"size": True}}, "r.inner.size: expected a whole number"),
        ({"name": "x", "many": {"size": 1}}, "r.many: expected a list"),
        ({"name": "x", "inner": 3}, "r.inner: expected a table"),
    ],
)
def test_mistakes_are_named_with_their_place(values, said):
    with pytest.raises(ConfigError, match=said) as caught:
        from_mapping(Outer, values, "r")
    assert str(caught.value)


def test_overrides():
    assert apply_overrides({"a": {"b": 1}}, ["a.b=2", "a.c=x", "d=[1, 2]"]) == {
        "a": {"b": 2, "c": "x"},
        "d": [1, 2],
    }
    for wrong in ("a.b", "=3", "a..b=1", "a.b.c=1"):
        with pytest.raises(ConfigError, match="--set"):
            apply_overrides({"a": {"b": 1}}, [wrong])


def test_a_budget_must_be_one():
    with pytest.raises(ConfigError, match="exactly one of"):
        TrainConfig()
    with pytest.raises(ConfigError, match="exactly one of"):
        TrainConfig(steps=1, minutes=1.0)


def test_the_quickstart_recipe_is_valid_and_survives_writing(tmp_path):
    recipe = read_recipe(QUICKSTART, ("pretrain.steps=7",))
    recipe.check()
    assert recipe.table("pretrain").steps == 7
    (tmp_path / "again.toml").write_text(to_toml(recipe), "utf-8")
    assert read_recipe(tmp_path / "again.toml").tables == recipe.tables


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrian.steps=1", "Did you mean 'pretrain'"),
        ("pretrain.stps=1", "Did you mean 'steps'"),
        ("pretrain.model.widht=1", "Did you mean 'width'"),
        ("pretrain.optimizer=muno", "Did you mean 'muon'"),
        ("pretrain.model.heads=7", "multiple of 'heads'"),
        ("pretrain.minutes=1", "exactly one of"),
        ("tokenizer.vocab_size=5", "at least 260"),
    ],
)
def test_misspelt_recipes_are_refused_before_anything_runs(override, said):
    with pytest.raises(ConfigError) as caught:
        read_recipe(QUICKSTART, (override,)).check()
    assert said in str(caught.value)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(FileError):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [1,\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(tmp_path / "bad.toml")
