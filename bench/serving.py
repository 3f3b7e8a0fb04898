"""What lies above the engine's products: choosing tokens, guesses, shared prompts, many texts at once.

    python bench/serving.py MODEL.gguf [--pairs 10] [--json FILE]

Both sides of each figure in one run, by turns; medians of the ratios of pairs. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import lexmill
from lexmill.devices import this_machine
from lexmill.inference.generation import generation_config
from lexmill.inference.language_model import LanguageModel
from lexmill.inference.native.choosing import CHOOSE
from lexmill.inference.native.scheduler import Scheduler
from lexmill.inference.native.speculation import PromptLookup
from lexmill.inference.sampling import SamplingConfig, choose_in_numpy

REPEATS = (
    "Names and ages, as a list:\n"
    + "".join(f"- name: {name}, age: {age}, city: Paris, country: France\n" for name, age in
              (("Anna", 31), ("Ben", 24), ("Clara", 56), ("David", 47), ("Emma", 19), ("Felix", 62)))
    + "The same list again:\n"
)  # fmt: skip
PLAIN = "The history of the lighthouse on the northern coast begins with"


def paired(first: Callable[[], float], second: Callable[[], float], pairs: int) -> dict[str, float]:
    """Seconds of both by turns, and the median ratio of the first to the second."""
    first(), second()
    one, two = zip(*((first(), second()) for _ in range(pairs)))
    ratios = sorted(a / b for a, b in zip(one, two))
    return {
        "first_seconds": statistics.median(one),
        "second_seconds": statistics.median(two),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
    }


def timed(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return run


def choosing(pairs: int) -> dict[str, dict[str, float]]:
    """NumPy against compiled code, at 49,152 logits."""
    assert CHOOSE is not None
    logits = (3 * np.random.default_rng(0).standard_normal(49152)).astype(np.float32)
    settings = {
        "greedy": SamplingConfig(),
        "top-k 40, top-p 0.95": SamplingConfig(temperature=0.8, top_k=40, top_p=0.95),
        "top-p 0.95": SamplingConfig(temperature=0.8, top_p=0.95),
        "min-p 0.05": SamplingConfig(temperature=0.8, min_p=0.05),
    }
    found = {}
    for name, config in settings.items():
        asked = (logits, (), 0, config, 0.5, None, 0)
        found[name] = paired(
            timed(lambda: choose_in_numpy(*asked)),  # noqa: B023
            timed(lambda: CHOOSE(*asked)),  # noqa: B023
            pairs,
        )
    return found


def written(model: LanguageModel, prompts: list[str], tokens: int, guess: bool = False) -> list[int]:
    scheduler: Scheduler = model.backend.scheduler
    scheduler.drafter = PromptLookup if guess else None
    config = generation_config(max_tokens=tokens)
    texts = [scheduler.submit(model.tokenizer, model.tokenizer.encode(prompt), config) for prompt in prompts]
    return [step.token for text in texts for step in text if step.token is not None]


class Shown(dict[str, object]):
    """Figures that are printed as soon as they are known."""

    def __setitem__(self, name: str, value: object) -> None:
        print(f"{name}: {json.dumps(value)}", flush=True)
        super().__setitem__(name, value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = lexmill.load(options.model, backend="native")
    engine = model.backend.engine
    found = Shown()
    found["machine"] = {"cpu": this_machine().cpu_class, "threads": engine.threads}
    found["choosing, NumPy / compiled"] = choosing(options.pairs)
    for name, prompt in (("repeating", REPEATS), ("plain", PLAIN)):
        sides = [written(model, [prompt], options.tokens, guess) for guess in (False, True)]
        assert sides[0] == sides[1], "guesses changed a text"
        found[f"guesses, without / with: {name} text"] = paired(
            timed(lambda: written(model, [prompt], options.tokens)),  # noqa: B023
            timed(lambda: written(model, [prompt], options.tokens, True)),  # noqa: B023
            options.pairs,
        )
    long = (
        "It is a truth universally acknowledged, that a man in possession of a fortune must want a wife. "
        * 30
    )

    def first_token(fresh: bool) -> None:
        if fresh:
            model.backend.scheduler.store.prefixes.clear()
        written(model, [long], 1)

    found["first token of a prompt, new / known"] = paired(
        timed(lambda: first_token(True)), timed(lambda: first_token(False)), options.pairs
    )
    prompts = [f"{PLAIN} the year {1700 + number}, when" for number in range(8)]
    alone = [token for one in prompts for token in written(model, [one], options.tokens)]
    assert alone == written(model, prompts, options.tokens), "company changed a text"
    found["8 texts, one after the other / together"] = paired(
        timed(lambda: [written(model, [one], options.tokens) for one in prompts]),
        timed(lambda: written(model, prompts, options.tokens)),
        max(3, options.pairs // 3),
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
