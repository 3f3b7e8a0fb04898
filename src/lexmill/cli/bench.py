"""`lexmill bench`: how fast a model runs here, and how near that is to what the machine can do."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli.options import Json, print_json

ModelOrFile = Annotated[
    Path, typer.Argument(help="A GGUF file, a model directory or a run directory.", metavar="MODEL")
]


def bench(
    model: ModelOrFile,
    prompt: Annotated[
        int, typer.Option("--prompt", min=0, help="Tokens of the prompt; 0 leaves it out.")
    ] = 256,
    generate: Annotated[
        int, typer.Option("--generate", min=0, help="Tokens that are written; 0 leaves it out.")
    ] = 64,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, show_default="OMP_NUM_THREADS, or all cores"),
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Runs of each; the median counts.")] = 5,
    json: Json = False,
) -> None:
    """Measure tokens a second in lexmill's engine: of a prompt, and of writing one token after the other."""
    from lexmill import devices
    from lexmill.inference.language_model import find_model
    from lexmill.inference.native.engine import NativeEngine
    from lexmill.inference.native.interface import BLOCK
    from lexmill.inference.native.library import instruction_set
    from lexmill.inference.native.limits import measure_limits
    from lexmill.inference.native.speed import (
        measure_speed,
        open_source,
        prompt_operations,
        step_bytes,
        stored_type,
    )

    path = model if model.is_file() else find_model(model)
    source = open_source(path)
    count, context = threads or devices.threads(), max(prompt, generate, BLOCK)
    engine = NativeEngine.open(source, threads=count, context=context, pages=-(-context // BLOCK))
    speed = measure_speed(engine, min(prompt, engine.context), min(generate, engine.context), repeat)
    size = step_bytes(engine)
    config, weights = engine.config, stored_type(source)
    engine.close()
    limits = measure_limits(count, size)
    machine = devices.this_machine()
    found: dict[str, Any] = {
        "model": str(path),
        "weights": weights,
        "step_bytes": size,
        "cpu": machine.cpu,
        "cpu_class": machine.cpu_class,
        "instruction_set": instruction_set(),
        "threads": count,
        "prompt_tokens": prompt,
        "generated_tokens": generate,
        "prompt_tokens_per_second": _middle(speed.prompt),
        "decode_tokens_per_second": _middle(speed.decode),
        "prompt_runs": speed.prompt,
        "decode_runs": speed.decode,
        "limits": vars(limits),
        "share_of_memory_rate": None,
        "share_of_int8_rate": None,
        "share_of_bfloat16_rate": None,
    }
    if speed.decode:
        found["share_of_memory_rate"] = (
            found["decode_tokens_per_second"] * size / limits.model_bytes_per_second
        )
    if speed.prompt and config.shape != "encoder_decoder":
        rate = found["prompt_tokens_per_second"] * prompt_operations(config, prompt)
        for kind, limit in (("int8", limits.int8_per_second), ("bfloat16", limits.bfloat16_per_second)):
            found[f"share_of_{kind}_rate"] = rate / limit if limit else None
    if json:
        print_json(found)
    else:
        _show(found)


def _middle(rates: tuple[float, ...]) -> float | None:
    return statistics.median(rates) if rates else None


def _show(found: dict[str, Any]) -> None:
    limits = found["limits"]
    typer.echo(
        f"{found['model']}: {found['weights']}, {found['step_bytes'] / 1e6:,.1f} MB of weights a token"
    )
    typer.echo(f"{found['cpu']} ({found['instruction_set']}), {found['threads']} threads")
    for what, tokens in (("prompt", "prompt_tokens"), ("decode", "generated_tokens")):
        rates = found[f"{what}_runs"]
        if rates:
            typer.echo(
                f"{what:<8}{found[tokens]:>6,} tokens {found[f'{what}_tokens_per_second']:>10,.1f} tokens/s"
                f"  (from {min(rates):,.1f} to {max(rates):,.1f})"
            )
    typer.echo("limits, measured just now:")
    typer.echo(
        f"  memory  {limits['memory_bytes_per_second'] / 1e9:>8,.1f} GB/s, "
        f"{limits['model_bytes_per_second'] / 1e9:,.1f} GB/s for as many bytes as a token's weights"
        + _share(found["share_of_memory_rate"], "writing")
    )
    for name, kind in (("bytes", "int8"), ("bfloat16", "bfloat16"), ("float32", "float32")):
        rate, share = limits[f"{kind}_per_second"], found.get(f"share_of_{kind}_rate")
        if rate:
            typer.echo(f"  {name:<8}{rate / 1e9:>8,.1f} Gop/s" + _share(share, "the prompt"))


def _share(share: float | None, who: str) -> str:
    return f"; {who} reaches {share:.0%}" if share is not None else ""
