"""A classifier that two processes train, each with a part of it (FSDP): calibrated as one process would."""

import json
import subprocess
import sys

import pytest
from conftest import lexmill
from made_models import model_maker

from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS

SHAPE = dict(
    vocab_size=520, width=32, layers=2, heads=2, kv_heads=2, head_width=16, mlp_width=48, context=128
)
BERT = {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"]}


@pytest.mark.slow
def test_a_classifier_in_parts_is_calibrated(tmp_path, prose):
    base = model_maker(tmp_path / "base", prose, SHAPE, {"bert": ("wordpiece", BERT)})("bert").path
    words = {"sea": ["ship", "sailor", "captain"], "house": ["mother", "father", "sister"]}
    rows = [
        {"text": f"{words[label][i % 3]} went there {i} times", "label": label}
        for i in range(60)
        for label in words
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    command = [
        "finetune",
        str(base),
        "--task",
        "classify",
        "--data",
        str(data),
        "--steps",
        "20",
        "--no-score",
    ]
    for setting in ("rows=4", "row_length=64", "validation_fraction=0.3", "device=cpu", "precision=float32"):
        command += ["--set", setting]
    alone = lexmill(*command, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "lexmill",
    ]
    together = [*launch, *command, "--set", "sharding=shard", "--out", str(tmp_path / "together")]
    done = subprocess.run(together, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        json.loads((tmp_path / name / "model" / "lexmill.json").read_text("utf-8"))["calibration"]
        for name in ("alone", "together")
    )
    assert one["rows"] == two["rows"] > 10
    assert two["temperature"] == pytest.approx(one["temperature"], rel=0.05)
