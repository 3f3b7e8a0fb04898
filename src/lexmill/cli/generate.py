"""`lexmill generate`: let a model write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli.options import (
    AnyModel,
    Backend,
    Frequency,
    Grammar,
    Json,
    JsonSchema,
    MaxTokens,
    MinP,
    Penalty,
    Presence,
    Quiet,
    Regex,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    begin_computing,
    print_json,
    read_form,
)


def generate(
    model: AnyModel,
    prompt: Annotated[str, typer.Argument(help="The text to continue; '-' reads standard input.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    logprobs: Annotated[
        int, typer.Option("--logprobs", help="Show each token's probability and its N best rivals.", min=0)
    ] = 0,
    backend: Backend = "auto",
    draft: Annotated[
        Path | None,
        typer.Option(
            "--draft", help="A small model with the same tokenizer, which guesses ahead.", show_default=False
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text, token by token. Greedy unless --temperature is above 0."""
    begin_computing()
    from lexmill.inference.language_model import generation_config, load

    config = generation_config(
        max_tokens=max_tokens,
        stop=stop or (),
        logprobs=logprobs,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        **read_form(json_schema, regex, grammar),
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = load(model, backend=backend, draft=draft)
    steps = loaded.stream(text, config)
    if json:
        taken = list(steps)
        print_json(
            {
                "prompt": text,
                "text": "".join(step.text for step in taken),
                "ids": [step.token for step in taken if step.token is not None],
                "reason": taken[-1].reason,
                **(
                    {"logprobs": [_told(step) for step in taken if step.token is not None]}
                    if logprobs
                    else {}
                ),
            }
        )
        return
    if logprobs:
        _show_distribution(loaded, steps)
        return
    if not quiet:
        sys.stdout.write(text)
    for step in steps:
        sys.stdout.write(step.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _told(step: Any) -> dict[str, Any]:
    return {
        "id": step.token,
        "logprob": round(step.logprob, 6),
        "rivals": [{"id": r.token, "text": r.text, "logprob": round(r.logprob, 6)} for r in step.rivals],
    }


def _show_distribution(loaded: Any, steps: Any) -> None:
    import math

    typer.echo(f"{'token':<18} {'probability':>11}   likeliest at this place")
    for step in steps:
        if step.token is None:
            typer.echo(f"(ended: {step.reason})")
            continue
        chosen = repr(loaded.tokenizer.decode([step.token]))
        rivals = "  ".join(f"{rival.text!r} {math.exp(rival.logprob):.3f}" for rival in step.rivals)
        typer.echo(f"{chosen:<18} {math.exp(step.logprob):>11.3f}   {rivals}")
