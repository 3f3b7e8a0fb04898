"""Adapters for llama.cpp: a LoRA adapter as one GGUF file, and back.

Keys and names follow llama.cpp: src/llama-adapter.cpp, convert_lora_to_gguf.py. A file holds for each matrix
NAME two tensors, NAME.lora_a and NAME.lora_b; llama.cpp multiplies their product by alpha / rank, one alpha
for the whole file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from lexmill import __version__
from lexmill.errors import ConfigError, FormatError, ModelError
from lexmill.files import explain_os_errors, partial_name, sha256_file
from lexmill.formats.blocks import BLOCK_TYPES, BlockType, encode
from lexmill.formats.gguf import GGUFFile, TensorToWrite, f32, string, u32, write_gguf
from lexmill.model.adapter import Adapter, LoraConfig, LowRank
from lexmill.model.adapter_files import AdapterDirectory, write_adapter
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory
from lexmill.model.gguf_shapes import permute_rope, require_place, unpermute_rope
from lexmill.model.names import LinearLayer, linear_layers

# general.file_type of the types that an adapter may have
ADAPTER_TYPES = {"f32": 0, "f16": 1, "bf16": 32}
_ALPHA, _KIND = "adapter.lora.alpha", "adapter.type"
_HINT = "Merge it instead: lexmill merge ADAPTER --out MODEL."
_DAMAGED = "The file is damaged or incomplete; make or copy it again."


def export_adapter_gguf(adapter: AdapterDirectory | Path | str, out: Path | str, type: str = "f32") -> Path:
    """Write an adapter as a GGUF file, atomically, for llama.cpp's --lora beside a file of its base.

    Args:
        adapter: the adapter directory, or its path.
        type: of `ADAPTER_TYPES`. Adapters are small: f32 loses nothing.

    Returns:
        `out`.

    Raises:
        ConfigError: another type.
        ModelError: a base or an adapted module that llama.cpp has no place for.
    """
    if type.lower() not in ADAPTER_TYPES:
        raise ConfigError(
            f"An adapter cannot be written as '{type}'.", f"Take one of {', '.join(ADAPTER_TYPES)}."
        )
    adapter = adapter if isinstance(adapter, AdapterDirectory) else AdapterDirectory.open(adapter)
    config, where, out = adapter.config, str(adapter.path), Path(out)
    require_place(config, where)
    layers = _placed_layers(adapter.adapter, config, where)
    alpha = _common_alpha(adapter.adapter)
    kind = BLOCK_TYPES[type.upper()]
    metadata = {
        "general.architecture": string(config.family),
        "general.type": string("adapter"),
        "general.name": string(str(adapter.lineage.get("name") or adapter.path.resolve().name)),
        "general.file_type": u32(ADAPTER_TYPES[type.lower()]),
        _KIND: string("lora"),
        _ALPHA: f32(alpha),
    }
    unfinished = partial_name(out)
    with explain_os_errors(out, "write"):
        try:
            write_gguf(unfinished, metadata, _rows(adapter.adapter, layers, config, alpha, kind))
            with GGUFFile.open(unfinished) as file:
                _read(file, config)
            os.replace(unfinished, out)
        finally:
            unfinished.unlink(missing_ok=True)
    return out


def _placed_layers(adapter: Adapter, config: ModelConfig, where: str) -> list[LinearLayer]:
    """The adapted layers, all of which llama.cpp has a place for.

    Raises:
        ModelError: one has none, or whole weights are replaced.
    """
    if adapter.replaced:
        raise ModelError(
            f"{where}: this adapter also replaces whole weights ({min(adapter.replaced)}), which a GGUF adapter cannot.",
            _HINT,
        )
    layers = [layer for layer in linear_layers(config) if layer.huggingface in adapter.changes]
    for layer in layers:
        scaled_head = layer.owns == ("head",) and config.scale_output
        if not layer.gguf or scaled_head:
            raise ModelError(
                f"{where}: llama.cpp has no place for an adapter of '{layer.huggingface}'.", _HINT
            )
    return layers


def _common_alpha(adapter: Adapter) -> float:
    """The alpha by which llama.cpp comes to each module's scale; of several the commonest, and the rest go into B."""
    alphas = Counter(float(change.scale * change.rank) for change in adapter.changes.values())
    return alphas.most_common(1)[0][0]


def _rows(
    adapter: Adapter, layers: list[LinearLayer], config: ModelConfig, alpha: float, kind: BlockType
) -> Iterator[TensorToWrite]:
    for layer in layers:
        change = adapter.changes[layer.huggingface]
        own = change.scale * change.rank
        b = change.b if own == alpha else (change.b * np.float64(own / alpha)).astype(np.float32)
        heads = _turned_heads(layer, config)
        for half, array in (("a", change.a), ("b", permute_rope(b, heads) if heads else b)):
            name = f"{layer.gguf}.lora_{half}"
            yield TensorToWrite(name, array.shape, kind, partial(encode, array, kind))


def _turned_heads(layer: LinearLayer, config: ModelConfig) -> int:
    """Of how many heads the rows lie in another order in the file; 0 where they do not."""
    if not layer.rope or config.family != "llama":
        return 0
    return config.heads if layer.rope == "q" else config.kv_heads


def import_adapter(source: Path | str, base: Path | str, out: Path | str) -> AdapterDirectory:
    """Make an adapter directory of an adapter made by others: a GGUF file, or PEFT's folder.

    Args:
        base: the model directory that it is for.

    Raises:
        FileError: there is nothing at `source`, or something else at `out`.
        FormatError: a damaged file.
        ModelError: an adapter of another kind, or of another model.
    """
    source, out, model = Path(source), Path(out), ModelDirectory.open(base)
    if out.exists() and (
        not out.is_dir() or (any(out.iterdir()) and not (out / "adapter_config.json").is_file())
    ):
        raise ConfigError(f"{out} holds something that is no adapter.", "Choose another folder with --out.")
    if source.is_dir():
        opened = AdapterDirectory.open(source, model)
        adapter, kind, file = opened.adapter, "PEFT directory", source / "adapter_model.safetensors"
    else:
        file, kind = source, "GGUF adapter"
        with GGUFFile.open(source) as gguf:
            adapter = read_adapter_gguf(gguf, model.config)
    imported = {
        "format": kind,
        "file": source.resolve().name,
        "sha256": sha256_file(file),
        "by": f"lexmill {__version__}",
    }
    return write_adapter(out, adapter, model, {"name": source.resolve().stem, "imported": imported})


def read_adapter_gguf(file: GGUFFile, config: ModelConfig) -> Adapter:
    """The adapter in a GGUF file.

    Raises:
        FormatError: a damaged file.
        ModelError: not a LoRA adapter, or one for another kind of model.
    """
    expected = {"general.type": "adapter", _KIND: "lora", "general.architecture": config.family}
    for key, value in expected.items():
        if file.metadata.get(key) != value:
            raise ModelError(
                f"{file.path}: {key} is {str(file.metadata.get(key))[:60]!r} instead of '{value}'.",
                "Is it a LoRA adapter, and for this base?",
            )
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise ModelError(f"{file.path}: adapters that wait for a phrase (aLoRA) are not supported.")
    return _read(file, config)


def _read(file: GGUFFile, config: ModelConfig) -> Adapter:
    alpha = file.metadata.get(_ALPHA, 0.0)
    if not isinstance(alpha, float) or not np.isfinite(alpha) or alpha < 0:
        raise FormatError(
            f"{file.path}: {_ALPHA} is {str(alpha)[:60]!r}, which is no positive number.", _DAMAGED
        )
    layers = {layer.gguf: layer for layer in linear_layers(config) if layer.gguf}
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, info in file.tensors.items():
        place, _, half = name.rpartition(".lora_")
        if half not in ("a", "b") or place not in layers or len(info.shape) != 2:
            raise ModelError(
                f"{file.path}: the tensor '{name}' has no place in an adapter of a {config.family} model here."
            )
        found.setdefault(place, {})[half] = file.read(name)
    changes = {}
    for place, pair in found.items():
        layer = layers[place]
        if set(pair) != {"a", "b"} or pair["b"].shape[1] != len(pair["a"]):
            raise FormatError(f"{file.path}: the two halves for '{place}' do not belong together.", _DAMAGED)
        if pair["b"].shape[0] != layer.outputs:  # before its rows are put in order
            raise ModelError(
                f"{file.path}: '{place}' has {pair['b'].shape[0]:,} rows instead of {layer.outputs:,}."
            )
        heads, rank = _turned_heads(layer, config), len(pair["a"])
        b = unpermute_rope(pair["b"], heads) if heads else pair["b"]
        changes[layer.huggingface] = LowRank(pair["a"], b, alpha / rank if alpha else 1.0)
    if not changes:
        raise FormatError(f"{file.path}: the adapter is empty.", _DAMAGED)
    adapter = Adapter(_described(changes, alpha), changes)
    adapter.check(config, str(file.path))
    return adapter


def _described(changes: dict[str, LowRank], alpha: float) -> LoraConfig:
    """Settings that say what the arrays are: the commonest rank, and the others by full names."""
    rank = Counter(change.rank for change in changes.values()).most_common(1)[0][0]
    other = {module: change.rank for module, change in changes.items() if change.rank != rank}
    return LoraConfig(
        rank=rank,
        alpha=alpha or rank,  # without an alpha the product counts as it is: a scale of 1
        targets=tuple(sorted(changes)),
        rank_pattern=other,
        alpha_pattern={} if alpha else {module: float(number) for module, number in other.items()},
    )
