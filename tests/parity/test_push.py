"""`lexmill push`: the real client of the hub against a hub on this machine, and the model read back from there."""

import subprocess
import sys

import hub_server
import pytest
from conftest import lexmill

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub():
    with hub_server.serving() as hub:
        yield hub


def surroundings(hub, tmp_path, token=hub_server.TOKEN):
    """HF_HUB_DISABLE_XET: files go by LFS, as wherever the package hf-xet is not installed."""
    return {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": token,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


def test_a_model_is_uploaded_whole(hub, tmp_path, model_path):
    env = surroundings(hub, tmp_path)
    done = lexmill("push", model_path, "you/toy", "--private", "--message", "first", env=env)
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/you/toy/commit/" in done.stdout
    assert hub.repos["you/toy"]["private"]
    files = hub.files("you/toy")
    assert files["model.safetensors"] == (model_path / "model.safetensors").read_bytes()
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}
    assert wanted | {"generation_config.json", "lexmill.json"} <= set(files)
    assert [commit[:2] for commit in hub.repos["you/toy"]["commits"]] == [("main", "first")]
    # again, to another branch of the repository that is there: the weights are not sent twice
    sent = len([row for row in hub.log if row[0] == "PUT"])
    done = lexmill("push", model_path, "you/toy", "--revision", "next", "--quiet", env=env)
    assert done.returncode == 0, done.stderr
    assert hub.files("you/toy", "next").keys() == files.keys()
    assert len([row for row in hub.log if row[0] == "PUT"]) == sent
    # a name without an owner is one's own
    assert lexmill("push", model_path, "mine", env=env).returncode == 0 and "me/mine" in hub.repos


def test_transformers_reads_what_was_uploaded(hub, tmp_path, model_path):
    env = surroundings(hub, tmp_path)
    assert lexmill("push", model_path, "you/toy", env=env).returncode == 0
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('you/toy')\n"
        "tokenizer = AutoTokenizer.from_pretrained('you/toy')\n"
        "ids = tokenizer('It is', return_tensors='pt')\n"
        "print(model.generate(**ids, max_new_tokens=8)[0].tolist())\n"
    )
    import os

    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model, tokenizer = (auto.from_pretrained(model_path) for auto in (AutoModelForCausalLM, AutoTokenizer))
    own = model.generate(**tokenizer("It is", return_tensors="pt"), max_new_tokens=8)[0].tolist()
    assert done.stdout.strip() == str(own)


@pytest.mark.parametrize(
    "fail,token,repo,message",
    [
        ({}, "wrong", "you/toy", "HF_TOKEN"),
        ({"/api/repos/create": 403}, hub_server.TOKEN, "you/toy", "may not write"),
        ({"/commit/": 500}, hub_server.TOKEN, "you/toy", "500"),
        ({}, hub_server.TOKEN, "a/b/c", "no name of a repository"),
    ],
)
def test_refusals_say_what_to_do(hub, tmp_path, model_path, fail, token, repo, message):
    hub.fail = fail
    done = lexmill("push", model_path, repo, env=surroundings(hub, tmp_path, token))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_no_hub_there(tmp_path, model_path):
    class Nowhere:
        address = "http://127.0.0.1:9"

    done = lexmill("push", model_path, "you/toy", env=surroundings(Nowhere, tmp_path))
    assert done.returncode == 2 and "cannot be reached" in done.stderr, done.stderr
