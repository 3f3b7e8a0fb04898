"""Writes `docs/command-line.md` from the program's own help, so that the two cannot differ."""

import os
import subprocess
import sys
from pathlib import Path

VERBS = [
    [], ["run"], ["prepare"], ["tokenizer"], ["tokenizer", "train"], ["tokenizer", "encode"], ["tokenizer", "decode"],
    ["tokenizer", "inspect"], ["pretrain"], ["finetune"], ["merge"], ["evaluate"], ["generate"], ["chat"], ["explain"],
    ["explain", "attention"], ["explain", "word"], ["export"],
    ["export", "hf"], ["export", "gguf"], ["export", "ollama"], ["ollama"],
    ["ollama", "list"], ["ollama", "show"], ["ollama", "rm"], ["verify"], ["report"], ["bench"], ["doctor"],
]  # fmt: skip


def reference() -> str:
    """The whole page."""
    parts = ["# Command line\n\nMade by `make docs` from the program itself.\n"]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    for verb in VERBS:
        command = [sys.executable, "-m", "lexmill.cli.main", *verb, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        text = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        text = text.replace("python -m lexmill.cli.main", "lexmill")
        parts.append(f"## lexmill {' '.join(verb)}".rstrip() + f"\n\n```\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("command-line.md").write_text(reference(), "utf-8")
