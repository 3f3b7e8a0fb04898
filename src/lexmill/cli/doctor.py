"""`lexmill doctor`: what this machine offers, and what is missing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lexmill.cli.options import Json, begin_computing, print_json

_NEEDED = ("torch", "numpy", "tokenizers", "pyarrow")
_OPTIONAL = {
    "transformers": ("compares answers with Hugging Face", 'pip install "lexmill[runtimes]"'),
    "llguidance": ("holds texts to a JSON schema or a grammar", 'pip install "lexmill[constrain]"'),
    "xllamacpp": ("compares answers with llama.cpp", 'pip install "lexmill[runtimes]"'),
}


def doctor(
    json: Json = False,
    fast: Annotated[bool, typer.Option("--fast", help="Do not measure matrix products.")] = False,
) -> None:
    """Show cores, instruction sets, number formats and installed runtimes, and what to install."""
    found = _examine(fast)
    if json:
        print_json(found)
        return
    machine = found["machine"]
    typer.echo(f"CPU          {machine['cpu']}, {machine['cores']} cores usable, {found['threads']} threads")
    typer.echo(
        f"instructions {' '.join(machine['features']) or 'none of those we know'} ({found['cpu_class']})"
    )
    typer.echo(f"memory       {machine['memory_bytes'] / 2**30:.1f} GiB")
    for name, rate in found["matmul_gflops"].items():
        typer.echo(f"{name:<12} {rate:,.1f} GFLOP/s in a matrix product")
    if found["matmul_gflops"]:
        typer.echo(f"training     computes in {found['precision']}")
    typer.echo(f"engine       {found['engine']}")
    if found["kernels"]:
        typer.echo(f"kernels      {found['kernels']}")
    typer.echo(f"GPU          {found['gpu']}")
    for name, version in found["packages"].items():
        typer.echo(f"{name:<12} {version}")
    for name, (use, command) in _OPTIONAL.items():
        if found["packages"][name] == "not installed":
            typer.echo(f"missing: {name}, which {use}. Install it with: {command}")


def _engine() -> str:
    """The inference engine's instruction set, or why there is none and what is lost without it."""
    from lexmill.errors import ModelError
    from lexmill.inference.native.library import instruction_set

    try:
        return instruction_set()
    except ModelError as error:
        return (
            f"none: {error} Without it models run in torch: slower, a slower start, no batches of many texts."
        )


def _examine(fast: bool) -> dict[str, Any]:
    from importlib import metadata

    from lexmill.devices import this_machine, threads

    machine = this_machine()
    packages = {}
    for name in (*_NEEDED, *_OPTIONAL):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    rates: dict[str, float] = {}
    precision, gpu, kernels = "", "not looked for", ""
    if not fast and packages["torch"] != "not installed":
        begin_computing()
        import torch

        from lexmill.train.precision import choose_precision, matmul_gflops

        matmul_gflops(torch.float32)
        rates = {
            str(dtype).removeprefix("torch."): round(matmul_gflops(dtype, seconds=0.2), 1)
            for dtype in (torch.float32, torch.bfloat16)
        }
        from lexmill.model.kernels import KERNELS, why_none

        kernels = KERNELS.instruction_set if KERNELS else f"none, training is slower: {why_none()}"
        precision = choose_precision()
        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none that torch can use"
    return {
        "engine": _engine(),
        "machine": vars(machine),
        "cpu_class": machine.cpu_class,
        "threads": threads(),
        "matmul_gflops": rates,
        "precision": precision,
        "kernels": kernels,
        "gpu": gpu,
        "packages": packages,
    }
