"""Models made by others, as model directories: a GGUF file, or a Hugging Face directory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lexmill import __version__
from lexmill.errors import ConfigError, FileError, FormatError, ModelError
from lexmill.files import sha256_file
from lexmill.formats.gguf import GGUFFile
from lexmill.formats.safetensors import from_bfloat16
from lexmill.formats.safetensors_writing import SHARD_BYTES
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory, convert, write_model_directory
from lexmill.model.gguf_config import config_from_gguf, pooling_of
from lexmill.model.gguf_rope import ROPE_FREQS
from lexmill.model.gguf_shapes import read_weight, weight_from_gguf
from lexmill.model.names import WeightName, weight_names, weight_shapes
from lexmill.progress import SILENT, Progress, Task
from lexmill.runtimes.gguf_kept import asked_in, keep
from lexmill.runtimes.huggingface import check_target, publish
from lexmill.tokenizer.gguf_reading import import_tokenizer
from lexmill.tokenizer.gguf_vocabulary import read_vocabulary

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
    kind, name = (file.metadata.get(f"general.{key}") for key in ("type", "name"))
    if kind is not None and not (isinstance(kind, str) and kind == "model"):
        raise ModelError(
            f"{file.path} holds '{str(kind)[:60]}', not a model.",
            "Adapters are imported with --base MODEL; projectors and importance matrices cannot be.",
        )
    vocabulary = read_vocabulary(file)
    config = config_from_gguf(file, vocabulary.rows)
    weights = GGUFWeights(file, config)
    tokenizer = import_tokenizer(vocabulary)
    tokenizer.settings["model_max_length"] = config.context
    pooling = pooling_of(file) if config.shape == "encoder" else "mean"
    dtypes = {own: dtype for own in weights} if dtype else weights.exact_dtypes()
    license = file.metadata.get("general.license")
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
    lineage |= asked_in(file)
    kept = keep(file, config, tokenizer, pooling)
    if kept:
        lineage["gguf"] = kept
    with progress.task(f"importing {file.path.name}", config.parameters, "weights") as task:
        weights.task = task
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


class GGUFWeights(Mapping[str, np.ndarray]):
    """The weights of a GGUF file by lexmill's names, decoded to float32 when they are asked for.

    Raises:
        FormatError: a weight is missing, has another shape, or is of a type that cannot be read.
        ModelError: the file has weights for which this shape has no place.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.file, self.config, self.task = file, config, Task("", None, "")
        self._names = {name.own: name for name in weight_names(config)}
        shapes = weight_shapes(config)
        for own, name in self._names.items():
            info = file.tensors.get(name.gguf)
            if info is None:
                raise FormatError(f"{file.path}: the tensor '{name.gguf}' is missing.", _HINT)
            expected = name.whole_shape(shapes[own])
            if info.shape != expected:
                raise FormatError(
                    f"{file.path}: the tensor '{name.gguf}' has the shape {info.shape} instead of {expected}.",
                    _HINT,
                )
        # read with the shape; computed anew by every writer
        unused = set(file.tensors) - {name.gguf for name in self._names.values()} - {ROPE_FREQS}
        if unused:
            raise ModelError(
                f"{file.path}: the tensor '{min(unused)}' has no place in a {config.family} model here.",
                "It may have heads, biases or layers that lexmill does not have.",
            )

    def __getitem__(self, own: str) -> np.ndarray:
        weight = weight_from_gguf(self._stored(self._names[own]), self.config, self._names[own])
        self.task.advance(weight.size)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _stored(self, name: WeightName) -> np.ndarray:
        values = read_weight(self.file, name)
        if not np.isfinite(values).all():
            raise FormatError(
                f"{self.file.path}: the tensor '{name.gguf}' holds something that is no number.", _HINT
            )
        return values

    def exact_dtypes(self) -> dict[str, str]:
        """How to store each weight so that nothing is lost: in one type for all if there is one below F32."""
        for dtype in ("BF16", "F16"):
            if all(self._fits(name, dtype) for name in self._names.values()):
                return dict.fromkeys(self._names, dtype)
        kinds = {own: self.file.tensors[name.gguf].type.name for own, name in self._names.items()}
        return {own: kind if kind in ("F16", "BF16") else "F32" for own, kind in kinds.items()}

    def _fits(self, name: WeightName, dtype: str) -> bool:
        kind = self.file.tensors[name.gguf].type.name
        if kind == dtype:
            return True
        values = self._stored(name)
        stored = convert(values, dtype)
        back = from_bfloat16(stored) if dtype == "BF16" else stored.astype(np.float32)
        return np.array_equal(back.view(np.uint32), values.view(np.uint32))


_HINT = "The file is damaged or incomplete; make or copy it again."
