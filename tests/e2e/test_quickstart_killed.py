"""kill -9 in each step of recipes/quickstart.toml itself, with fewer steps of training."""

import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, lexmill

STEPS = ("prepare", "tokenizer", "pretrain", "finetune", "evaluate", "export", "verify", "report")
SETTINGS = [
    f"--set={setting}"
    for setting in (
        "pretrain.steps=30",
        "pretrain.checkpoint_seconds=0.0",
        "finetune.steps=20",
        "finetune.checkpoint_seconds=0.0",
    )
]
RESULTS = ("model/model.safetensors", "model/tokenizer.json", "export/model-q8_0.gguf", "export/Modelfile")


def run(out):
    return ["run", str(ROOT / "recipes" / "quickstart.toml"), "--out", str(out), *SETTINGS]


def kill_in(step, out):
    """Start the run and end it the hard way while `step` works; says whether it was in time."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lexmill.cli.main", *run(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stderr:
        if line.startswith(f"{step}:"):
            break
    if step in ("pretrain", "finetune"):  # well inside: two checkpoints stand
        checkpoints = out / ".work" / step / step / "checkpoints"
        while process.poll() is None and len(list(checkpoints.glob("step-*"))) < 2:
            time.sleep(0.02)
    else:
        time.sleep({"evaluate": 0.5, "verify": 1.0}.get(step, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    return not (out / step / "step.json").is_file()


@pytest.mark.slow
def test_the_quickstart_killed_in_every_step_gives_the_same_model(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = lexmill(*run(whole), timeout=1200)
    assert done.returncode == 0, done.stderr
    in_time = [step for step in STEPS if kill_in(step, killed)]
    assert {"pretrain", "finetune"} <= set(in_time), in_time
    print("killed while at work:", ", ".join(in_time))
    again = lexmill(*run(killed), timeout=1200)
    assert again.returncode == 0, again.stderr
    for name in RESULTS:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    assert not [path for path in killed.rglob("*") if path.name.endswith(".partial")]
