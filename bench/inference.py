"""lexmill's engine against its peers on one machine: interleaved, in pairs, as a table of the median ratios.

Each side is a process of its own that waits while the other is timed (`bench/inference_sides.py`); who begins changes
from pair to pair. Each run adds its rows to a file of JSON lines, from which the table is printed, so that peers can be
measured one after the other. llama.cpp is a native build (`cmake -DGGML_NATIVE=ON`, optimised: look for -O3 among its
flags), not a wheel.

    python bench/inference.py --model smol-Q4_0.gguf --peer llama_cpp --library llama.cpp/build/bin --out rows.jsonl
    python bench/inference.py --model smol-BF16.gguf --peer transformers --peer-model SmolLM2/ --out rows.jsonl
    python bench/inference.py --model smol-Q4_0.gguf --peer openvino --python other-venv/bin/python --out rows.jsonl
    python bench/inference.py --model minilm-Q8_0.gguf --peer llama_cpp --tasks embed --out rows.jsonl
    python bench/inference.py --model smol-Q8_0.gguf --cpu-time --library llama.cpp/build/bin --out rows.jsonl
    python bench/inference.py --table --out rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.devices import this_machine, threads, usable_cores

TASKS = {
    "decode": ("write", 64, 64),
    "prompt 256": ("read", 256, 256),
    "prompt 512": ("read", 512, 512),
    "prompt 1024": ("read", 1024, 1024),
    "8 at once": ("together", 32, 8 * 32),
}
HERE = Path(__file__).resolve().parent
REST = 0.25  # seconds between two sides: what still spins (OpenMP's threads do) has stopped
FOREIGN = 0.06  # of the processors' time: when others take more, a run is made again
TRIES = 4


class Worker:
    """A side in a process of its own."""

    def __init__(
        self,
        side: str,
        settings: dict[str, Any],
        count: int,
        python: str = sys.executable,
        cpu_time: bool = False,
    ) -> None:
        self.cpu_time = cpu_time
        environment = os.environ | {"OMP_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [python, HERE / "inference_sides.py", side, json.dumps(settings | {"threads": count})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.version = self._answer()["version"]
        self.disturbed = 0  # runs that others disturbed to the last

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[2:]} ended: {self.process.wait()}")  # type: ignore[index]
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, task: str, what: Any) -> dict[str, Any]:
        """Let it work; again when other processes took part of the processors meanwhile."""
        assert self.process.stdin is not None
        for _ in range(1 if self.cpu_time else TRIES):
            if not self.cpu_time:
                wait_for_quiet()
            start, busy, own = time.perf_counter(), busy_seconds(), used_seconds(self.process.pid)
            self.process.stdin.write(
                json.dumps({"task": task, "what": what, "cpu_time": self.cpu_time}) + "\n"
            )
            self.process.stdin.flush()
            found = self._answer()
            if self.cpu_time:
                return found
            foreign = busy_seconds() - busy - (used_seconds(self.process.pid) - own)
            if (
                foreign <= FOREIGN * usable_cores() * (time.perf_counter() - start) + 0.02
            ):  # the clock's ticks
                return found
        self.disturbed += 1
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def busy_seconds() -> float:
    """Time that all processors have worked so far, and what the host took from us; 0 where there is no /proc."""
    if not Path("/proc/stat").is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def used_seconds(process: int) -> float:
    """Of it, what one process took."""
    path = Path(f"/proc/{process}/stat")
    if not path.is_file():
        return 0.0
    fields = path.read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(patience: float = 4.0) -> None:
    """Rest until nobody works, but not longer than that."""
    end = time.perf_counter() + patience
    while time.perf_counter() < end:
        busy = busy_seconds()
        time.sleep(REST)
        if busy_seconds() - busy <= 0.1 * usable_cores() * REST:
            return


def mixed_texts(count: int = 64, vocabulary: int = 30000) -> list[list[int]]:
    """Random ids, from 4 to 256 a text, short ones more often; as a sentence encoder would get them."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.uniform(np.log(4), np.log(256), count)).astype(int)
    return [[101, *map(int, random.integers(1000, vocabulary, length)), 102] for length in lengths]


def compare(ours: Worker, theirs: Worker, task: str, what: Any, tokens: int, pairs: int) -> dict[str, Any]:
    """Rates of both sides, pair by pair."""
    vectors = [
        side.ask(task, what)["vector"] for side in (ours, theirs)
    ]  # warms, and shows that both do the same
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for pair in range(pairs):
        sides = [("ours", ours), ("theirs", theirs)]
        for name, side in sides if pair % 2 else reversed(sides):
            rates[name].append(tokens / side.ask(task, what)["seconds"])
    ratios = sorted(a / b for a, b in zip(rates["ours"], rates["theirs"]))
    found: dict[str, Any] = {
        "ours": statistics.median(rates["ours"]),
        "theirs": statistics.median(rates["theirs"]),
        "ratio": statistics.median(ratios),
        "lower_quartile": ratios[len(ratios) // 4],
        "upper_quartile": ratios[-1 - len(ratios) // 4],
        "pairs": pairs,
        "disturbed": ours.disturbed + theirs.disturbed,
        "ratios": ratios,
    }
    if all(vectors):
        a, b = (np.array(vector) for vector in vectors)
        found["cosine"] = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return found


def time_starts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds from nothing to the first token, of `lexmill generate` and of llama.cpp's own program."""
    prompt = "The capital of France is"
    ours = [sys.executable, "-m", "lexmill.cli.main", "generate", arguments.model, prompt, "-n", "1"]
    theirs = [str(Path(arguments.library) / "llama-simple"), "-m", arguments.model, "-n", "1", prompt]
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for pair in range(arguments.pairs + 1):
        for name, command in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if pair:  # the first one warms files
                seconds[name].append(time.perf_counter() - start)
    ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["theirs"]))
    return {
        **{name: statistics.median(found) for name, found in seconds.items()},
        "ratio": statistics.median(ratios),
        "lower_quartile": ratios[len(ratios) // 4],
        "upper_quartile": ratios[-1 - len(ratios) // 4],
        "pairs": arguments.pairs,
        "ratios": ratios,
    }


def measure(arguments: argparse.Namespace) -> None:
    count = 1 if arguments.cpu_time else arguments.threads or threads()
    machine = this_machine()
    facts = {
        "date": date.today().isoformat(),
        "cpu": machine.cpu,
        "cpu_class": machine.cpu_class,
        "threads": count,
        "model": Path(arguments.model).name,
        "peer": arguments.label or arguments.peer,
        "time": "processor" if arguments.cpu_time else "clock",
    }
    if arguments.tasks == ["start"]:
        row = facts | {"task": "start", "versions": [], **time_starts(arguments)}
        with open(arguments.out, "a") as file:
            file.write(json.dumps(row) + "\n")
        show(row)
        return
    encoder = arguments.tasks == ["embed"]
    settings: dict[str, Any] = {"model": arguments.peer_model or arguments.model}
    if arguments.peer == "llama_cpp":
        settings |= {"library": arguments.library, "flash": arguments.flash}
    if arguments.kind:
        settings["kind"] = arguments.kind
    if encoder and arguments.peer in ("llama_cpp", "transformers"):
        settings["pooled"] = True
    held = {"instruction_set": arguments.instruction_set} if arguments.instruction_set else {}
    ours = Worker("native", {"model": arguments.model} | held, count, cpu_time=arguments.cpu_time)
    theirs = Worker(arguments.peer, settings, count, arguments.python, arguments.cpu_time)
    for name in arguments.tasks:
        texts = mixed_texts() if name == "embed" else []
        task, what, tokens = TASKS.get(name, ("embed", texts, sum(map(len, texts))))
        found = compare(ours, theirs, task, what, tokens, arguments.pairs)
        row = facts | {"task": name, "versions": [ours.version, theirs.version], **found}
        with open(arguments.out, "a") as file:
            file.write(json.dumps(row) + "\n")
        show(row)
    ours.close()
    theirs.close()


def show(row: dict[str, Any]) -> None:
    unit = "s" if row["task"] == "start" else "tokens/s"
    print(
        f"| {row['model']} | {row['task']} | {row['peer']} | {row['ours']:,.4g} | {row['theirs']:,.4g} {unit} | "
        f"**{row['ratio']:.2f}** ({row['lower_quartile']:.2f}–{row['upper_quartile']:.2f}) | "
        f"{row['threads']}, {row['time']} |",
        flush=True,
    )


def table(path: str) -> None:
    """The newest row of each comparison, as Markdown."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        newest[tuple(str(row[key]) for key in ("model", "task", "peer", "cpu", "threads", "time"))] = row
    first = next(iter(newest.values()))
    print(f"{first['cpu']} ({first['cpu_class']})\n")
    print("| file | task | peer | lexmill | peer | ratio: median (quartiles) | threads, time |")
    print("|---|---|---|---:|---:|---:|---|")
    for row in newest.values():
        show(row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="the file of JSON lines")
    parser.add_argument("--table", action="store_true", help="print the table of what was measured, and end")
    parser.add_argument("--model", help="the GGUF file or directory that the engine runs")
    parser.add_argument("--peer", default="llama_cpp")
    parser.add_argument("--peer-model", help="what the peer runs, if not the same file")
    parser.add_argument(
        "--kind", default="", help="of transformers and CTranslate2: in which type they compute"
    )
    parser.add_argument("--label", default="", help="the peer's name in the table")
    parser.add_argument("--python", default=sys.executable, help="the Python that has the peer installed")
    parser.add_argument(
        "--library", default=os.environ.get("LEXMILL_LLAMA_BIN", ""), help="llama.cpp's bin folder"
    )
    parser.add_argument(
        "--flash", type=int, default=1, help="llama.cpp's flash attention: 1, 0 or -1 (its choice)"
    )
    parser.add_argument("--instruction-set", default="", help="hold the engine down to this one")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, by its processor's time: for a machine that is busy",
    )
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=[*TASKS, "embed", "start"])
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.out)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
