"""kill -9 at random moments of training: the run goes on to the same bits, in all three shapes."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "train_together.py"
# packing, accumulation and dropout are on; a checkpoint is written whenever the last one stands
OPTIONS = ("steps=160", "rows=4", "micro_rows=2", "dropout=0.1", "keep_best=false")


def start(folder, family, processes=1, more=()):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, str(SCRIPT), str(folder), f"family={family}", *OPTIONS, *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process):
    said = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, said[-2000:]


def killed_once(folder, family, moment, more=()):
    """Train, and kill after `moment` more seconds once steps are done; whether it was still alive then."""
    process = start(folder, family, more=more)
    log = folder / "metrics.jsonl"
    before = log.stat().st_size if log.is_file() else 0
    while process.poll() is None and (not log.is_file() or log.stat().st_size <= before):
        time.sleep(0.01)
    time.sleep(moment)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def weights(folder):
    with np.load(folder / "weights.npz") as file:
        return {name: file[name] for name in file.files}


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def compare(family, kills, seed, tmp_path, more=()):
    finish(start(tmp_path / "whole", family, more=more))
    random_moment = random.Random(seed)
    interrupted = 0
    for _ in range(kills):
        interrupted += killed_once(tmp_path / "killed", family, random_moment.uniform(0.0, 1.0), more)
    finish(start(tmp_path / "killed", family, more=more))
    assert interrupted, "no kill came before the end: the test shows nothing"
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(np.array_equal(whole[name], again[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_killed_run_ends_in_the_same_bits(family, tmp_path):
    compare(family, 1, family, tmp_path)


@pytest.mark.parametrize("base", [pytest.param("float32", marks=pytest.mark.slow), "q4_1"])
def test_a_killed_adapter_ends_in_the_same_bits(base, tmp_path):
    compare("llama", 1, base, tmp_path, (f"lora={base}", "gradient_checkpointing=true"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_many_kills_end_in_the_same_bits(family, seed, tmp_path):
    compare(family, 4, seed, tmp_path)


def test_a_killed_run_that_stops_early_ends_in_the_same_bits(tmp_path):
    """What is best, and for how long nothing was better, is part of a checkpoint."""
    early = ("steps=2000", "keep_best=true", "patience=6", "validate_every=20", "learning_rate=0.0005")
    compare("llama", 1, "early", tmp_path, (*early, "optimizer=adamw"))
    assert 120 < losses(tmp_path / "whole")[-1][0] < 2000
