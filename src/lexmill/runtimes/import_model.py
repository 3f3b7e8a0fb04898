"""Models made by others, as model directories: a GGUF file, or a Hugging Face directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lexmill import __version__
from lexmill.errors import ConfigError, FileError, ModelError
from lexmill.files import sha256_file
from lexmill.formats.gguf import GGUFFile
from lexmill.formats.safetensors_writing import SHARD_BYTES
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.gguf_model import GGUFModel
from lexmill.progress import SILENT, Progress
from lexmill.runtimes.gguf_kept import keep
from lexmill.runtimes.huggingface import check_target, publish

DTYPES = {
    "auto": "",
    "f32": "F32",
    "float32": "F32",
    "f16": "F16",
    "float16": "F16",
    "bf16": "BF16",
    "bfloat16": "BF16",
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def import_model(
    source: Path | str,
    out: Path | str,
    *,
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = SILENT,
) -> ModelDirectory:
    """Make a model directory of a GGUF file or of a Hugging Face directory.

    Args:
        source: the file or the folder.
        out: the new folder; a model that is there already is replaced as a whole.
        dtype: how to store the weights. "auto" loses nothing: f16, bf16 and f32 stay what they are,
            and what is quantised becomes the smallest type that holds its values, as a rule f32.
            "f32", "f16" and "bf16" convert, and round where they must.
        shard_bytes: above this the weights are cut into several files with an index.

    Raises:
        FileError: there is nothing at `source`, or something else at `out`.
        FormatError: a damaged file.
        ModelError: a model that lexmill does not have; says what is different.
        ConfigError: an unknown dtype.
    """
    if dtype.lower() not in DTYPES:
        raise ConfigError(f"There is no dtype '{dtype}'.", f"Take one of {', '.join(DTYPES)}.")
    source, out = Path(source), Path(out)
    if source.is_dir():
        return _import_directory(source, out, DTYPES[dtype.lower()], shard_bytes)
    if not source.exists():
        raise FileError(f"{source}: there is no such file or folder.", "Check the spelling of the path.")
    check_target(source, out)
    with GGUFFile.open(source) as file:
        return _import_gguf(file, out, DTYPES[dtype.lower()], shard_bytes, progress)


def _import_directory(source: Path, out: Path, dtype: str, shard_bytes: int) -> ModelDirectory:
    if not (source / "config.json").is_file() and (source / "adapter_config.json").is_file():
        raise ModelError(f"{source} holds an adapter, not a model.", "Name its model with --base.")
    pickles = sorted(path.name for pattern in _PICKLES for path in source.glob(pattern))
    weights = sorted(path.name for path in source.glob("*.safetensors"))
    if pickles and not weights:
        raise ModelError(
            f"{source}: the weights are in {pickles[0]}, a pickle, which can run any program when it is read.",
            "Take the model's safetensors files, or convert it where that may happen: "
            "save_pretrained(folder, safe_serialization=True) in transformers.",
        )
    model = ModelDirectory.open(source)
    check_target(source, out)
    license = _license(source / "README.md")
    lineage = {
        "name": model.lineage.get("name") or source.resolve().name,
        **({"license": license} if license else {}),
        **model.lineage,
        "imported": {
            "format": "Hugging Face directory",
            "file": source.resolve().name,
            "sha256": {name: sha256_file(source / name) for name in weights},
            "by": f"lexmill {__version__}",
        },
    }
    return publish(model, out, lineage=lineage, dtype=dtype, shard_bytes=shard_bytes)


def _license(readme: Path) -> str:
    """What a model card's header says of the licence; "" if nothing."""
    if not readme.is_file():
        return ""
    with open(readme, encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 16)
    header = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = re.search(r"^license:[ \t]*[\"']?([A-Za-z0-9._-]+)", header, re.M)
    return found[1] if found else ""


def _import_gguf(
    file: GGUFFile, out: Path, dtype: str, shard_bytes: int, progress: Progress
) -> ModelDirectory:
    model = GGUFModel(file)
    config, weights, tokenizer, pooling = model.config, model.weights, model.tokenizer, model.pooling
    dtypes = {own: dtype for own in weights} if dtype else weights.exact_dtypes()
    name, license = (file.metadata.get(f"general.{key}") for key in ("name", "license"))
    lineage: dict[str, Any] = {
        "name": name if isinstance(name, str) and name else file.path.stem,
        **({"license": license} if isinstance(license, str) else {}),
        "imported": {
            "format": "GGUF",
            "file": file.path.name,
            "sha256": sha256_file(file.path),
            "types": ", ".join(sorted({info.type.name for info in file.tensors.values()})),
            "by": f"lexmill {__version__}",
        },
    }
    lineage |= model.lineage
    kept = keep(file, config, tokenizer, pooling)
    if kept:
        lineage["gguf"] = kept
    with progress.task(f"importing {file.path.name}", config.parameters, "weights") as task:
        weights.read = task.advance
        return write_model_directory(
            out,
            config,
            weights,
            tokenizer,
            lineage,
            dtypes=dtypes,
            pooling=pooling,
            shard_bytes=shard_bytes,
        )
