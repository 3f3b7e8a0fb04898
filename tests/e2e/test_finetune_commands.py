"""Fine-tuning as a user does it: train an adapter, talk to it, merge it, carry it to llama.cpp and back."""

import json

import pytest
from conftest import CORPORA, lexmill

SHORT = ("--set", "rows=4", "--set", "row_length=64", "--set", "too_long=cut")
SMALL = (*SHORT, "--set", "lora.rank=4", "--set", "precision=float32", "--set", "score_tokens=16")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "talks.jsonl"
    lines = (CORPORA / "dialogues" / "dialogues.jsonl").read_text("utf-8").splitlines()
    path.write_text("\n".join(lines[:60]) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model_path, rows):
    out = tmp_path_factory.mktemp("tuned") / "adapter"
    done = lexmill(
        "finetune", model_path, "--task", "chat", "--data", rows, "--out", out, "--lora", "--steps", 6, *SMALL
    )
    assert done.returncode == 0, done.stderr
    assert f"adapter in {out}" in done.stdout and "an adapter of" in done.stderr
    return out


def test_an_adapter_is_peft_s_two_files_and_what_training_leaves(adapter):
    names = {path.name for path in adapter.iterdir()}
    wanted = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lexmill.json",
        "metrics.jsonl",
        "training.json",
    }
    assert wanted <= names and not {"model", "checkpoints"} & names
    told = json.loads((adapter / "training.json").read_text("utf-8"))
    assert told["settings"]["optimizer"] == "adamw" and told["learning"] < told["parameters"]
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert sum("loss" in line for line in lines) == 6 and any("validation_loss" in line for line in lines)


def test_it_generates_merges_and_goes_to_llama_cpp_and_back(adapter, model_path, rows, tmp_path):
    said = lexmill("generate", adapter, "She was", "--max-tokens", 12)
    assert said.returncode == 0 and said.stdout.strip()
    merged = lexmill("merge", adapter, "--out", tmp_path / "merged", "--data", rows, "--json")
    assert merged.returncode == 0, merged.stderr
    figures = json.loads(merged.stdout)
    assert figures["dtypes"] == ["F32"] and figures["lost"] < 1e-4
    assert figures["loss"]["merged"] == pytest.approx(figures["loss"]["unmerged"], abs=1e-5)
    assert figures["loss"]["unmerged"] < figures["loss"]["of the base"]
    assert lexmill("generate", tmp_path / "merged", "She was", "--max-tokens", 12).stdout == said.stdout
    done = lexmill("export", "gguf", adapter, "--out", tmp_path / "adapter.gguf")
    assert done.returncode == 0, done.stderr
    again = lexmill("import", tmp_path / "adapter.gguf", "--base", model_path, "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert lexmill("generate", tmp_path / "again", "She was", "--max-tokens", 12).stdout == said.stdout
    done = lexmill("export", "ollama", adapter, "--out", tmp_path / "Modelfile", "--type", "f16")
    assert done.returncode == 0, done.stderr
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "Modelfile").read_text("utf-8")


@pytest.mark.slow
def test_the_same_command_again_does_not_train_what_is_done(adapter, model_path, rows, tmp_path):
    """A run that is over has no checkpoints: the command begins anew, and ends in the same adapter."""
    out = tmp_path / "adapter"
    done = lexmill(
        "finetune", model_path, "--data", rows, "--out", out, "--lora", "--steps", 6, *SMALL, "--quiet"
    )
    assert done.returncode == 0, done.stderr
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (adapter / name).read_bytes()


def test_all_weights_can_learn_from_a_file_too(model_path, rows, tmp_path):
    options = ("--steps", 3, *SHORT, "--json", "--no-score")
    done = lexmill(
        "finetune", model_path, "--data", rows, "--validation", rows, "--out", tmp_path / "all", *options
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == str(tmp_path / "all" / "model")
    assert lexmill("chat", tmp_path / "all", text="Hello\n").returncode == 0


def test_a_plan_writes_nothing(model_path, rows, tmp_path):
    options = (
        "--data",
        rows,
        "--steps",
        10,
        "--out",
        tmp_path / "out",
        "--set",
        "lora.quantise=q4_1",
        *SMALL,
    )
    done = lexmill("finetune", model_path, *options, "--plan")
    assert done.returncode == 0, done.stderr
    assert "an adapter; the rest stays" in done.stdout and "measured for 4 rows" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--task", "sing"), "'sing' is not a choice"),
        (("--lora", "--set", "lora.targets=['q_pro']"), "Did you mean 'q_proj'"),
        (("--set", "row_length=4096"), "more than the model's context"),
        (("--validation", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_mistakes_are_said(options, said, model_path, rows, tmp_path):
    done = lexmill("finetune", model_path, "--data", rows, "--out", tmp_path / "out", "--steps", 2, *options)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/adapter*")) and not (tmp_path / "out" / "model").exists()


def test_an_adapter_is_no_model(adapter, tmp_path):
    done = lexmill("export", "hf", adapter, "--out", tmp_path / "hf")
    assert done.returncode == 2 and "lexmill merge" in done.stderr
