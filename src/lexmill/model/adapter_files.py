"""Adapter directories: PEFT's own two files, read from whoever made them and written so that PEFT reads them.

Layout and settings: PEFT, "Checkpoint format". Beside them lies `lexmill.json`, as in a model directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.errors import FileError, FormatError, LexmillError, ModelError
from lexmill.files import explain_os_errors, read_json, require_file, sha256_file, write_json
from lexmill.formats.blocks import BLOCK_TYPES, decode, encode
from lexmill.formats.safetensors import SafetensorsFile
from lexmill.formats.safetensors_writing import write_safetensors
from lexmill.model.adapter import ALL_LINEAR, QUANTISED_TYPES, Adapter, LoraConfig, LowRank, MergedWeights
from lexmill.model.config import ModelConfig
from lexmill.model.directory import LINEAGE_FILE, ModelDirectory
from lexmill.model.heads import with_labels, with_span
from lexmill.model.names import linear_layers, matrices_in_blocks, weight_names

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings that change nothing of what a finished adapter computes.
_NEUTRAL = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "rank_pattern",
    "alpha_pattern", "modules_to_save", "peft_type", "peft_version", "task_type", "auto_mapping",
    "base_model_name_or_path", "revision", "inference_mode", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# The ways to begin an adapter that leave the base as it is; the others (PiSSA, OLoRA, LoftQ …) change it too.
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
_PLAIN = re.compile(r"\^?[A-Za-z0-9_.]{1,300}")
_TASKS = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM", "encoder": None}
_HEAD_TASKS = {"labels": "SEQ_CLS", "span": "QUESTION_ANS"}
_MOST_ENTRIES = 100_000
_HINT = "Is it a complete adapter that PEFT's save_pretrained wrote? Make or copy it again."


class AdapterDirectory:
    """An adapter on disk, with the model that it belongs to.

    Attributes:
        path: the folder.
        base: the model directory.
        adapter: what it changes.
        lineage: what `lexmill.json` says of its making; empty for adapters made by others.
    """

    def __init__(
        self, path: Path, base: ModelDirectory, adapter: Adapter, lineage: Mapping[str, Any]
    ) -> None:
        self.path, self.base, self.adapter, self.lineage = path, base, adapter, dict(lineage)

    @property
    def config(self) -> ModelConfig:
        """The shape of the base."""
        return self.base.config

    @property
    def quantised(self) -> str:
        """The type in which the base was kept while the adapter learned; "" for float32 or not known."""
        type = _facts(self.lineage).get("quantise")
        return type if type in QUANTISED_TYPES else ""

    def merged(self, as_trained: bool = False) -> MergedWeights:
        """The base's weights with the adapter in them.

        Args:
            as_trained: if the base was kept in few bits while the adapter learned, take what those bits say.
        """
        if not (as_trained and self.quantised):
            return MergedWeights(self.config, self.base.weight, self.adapter)
        kind, inside = BLOCK_TYPES[self.quantised.upper()], matrices_in_blocks(self.config)

        def rounded(own: str) -> np.ndarray:
            weight = self.base.weight(own)
            if own not in inside or not kind.fits(weight.shape):
                return weight
            return decode(encode(weight, kind), kind, weight.shape)

        return MergedWeights(self.config, rounded, self.adapter)

    @classmethod
    def open(cls, path: Path | str, base: ModelDirectory | Path | str | None = None) -> AdapterDirectory:
        """Read an adapter and open its base.

        Args:
            base: the model that it is for; when not given, the one that the adapter names.

        Raises:
            FileError: a file, or the base, is not there.
            FormatError: a damaged file.
            ModelError: an adapter of another kind, or of another model.
        """
        path = Path(path)
        settings = read_settings(path)
        lineage = read_json(path / LINEAGE_FILE, "lineage") if (path / LINEAGE_FILE).is_file() else {}
        lineage = lineage if isinstance(lineage, dict) else {}
        if not isinstance(base, ModelDirectory):
            base = ModelDirectory.open(base if base is not None else _find_base(path, settings, lineage))
        base = _with_head(path, base, settings, lineage)
        adapter = _read_adapter(path, settings, base.config)
        missing = set(base.begun) - set(adapter.replaced)
        if missing:
            raise ModelError(
                f"{path}: neither the adapter nor its base has the weight '{min(missing)}'.",
                "PEFT saves a head that is named in 'modules_to_save'.",
            )
        adapter.check(base.config, str(path))
        return cls(path, base, adapter, lineage)


def _with_head(
    path: Path, base: ModelDirectory, settings: Mapping[str, Any], lineage: Mapping[str, Any]
) -> ModelDirectory:
    """The base with the head that an adapter brings; itself where it brings none."""
    labels = _facts(lineage).get("labels")
    task = settings.get("task_type")
    if base.config.shape != "encoder":
        return base
    if task == _HEAD_TASKS["span"]:
        return with_span(base)
    if task != _HEAD_TASKS["labels"]:
        return base
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        return base if list(base.config.labels) == labels else with_labels(base, labels)
    # PEFT notes no names; it takes them from the base, which must be opened with as many labels
    with SafetensorsFile.open(require_file(path / WEIGHTS_FILE, "adapter weights file", _HINT)) as weights:
        heads = [name for name in weights.names() if name.endswith("classifier.weight")]
        count = weights.shape(heads[0])[0] if heads and weights.shape(heads[0]) else 0
    if not count or count == len(base.config.labels):
        return base
    return with_labels(base, [f"LABEL_{index}" for index in range(count)])


def is_adapter(path: Path | str) -> bool:
    """Whether a folder holds an adapter and no model."""
    path = Path(path)
    return (path / CONFIG_FILE).is_file() and not (path / "config.json").is_file()


def _facts(lineage: Mapping[str, Any]) -> Mapping[str, Any]:
    facts = lineage.get("adapter")
    return facts if isinstance(facts, dict) else {}


def read_settings(path: Path) -> dict[str, Any]:
    """`adapter_config.json`, checked to be of a kind that lexmill computes.

    Raises:
        FileError, FormatError: it is not there, or damaged.
        ModelError: another kind of adapter, or a setting that changes what it computes.
    """
    file = require_file(path / CONFIG_FILE, "adapter configuration", _HINT)
    settings = read_json(file, "adapter configuration")
    if not isinstance(settings, dict):
        raise FormatError(f"{file} should hold a JSON object.", _HINT)
    if settings.get("peft_type") != "LORA":
        raise ModelError(
            f"{file}: adapters of the kind {str(settings.get('peft_type'))[:60]!r} are not supported.",
            "LoRA is.",
        )
    for key, value in settings.items():
        if key == "init_lora_weights" and value not in _BEGINNINGS:
            raise ModelError(
                f"{file}: 'init_lora_weights' is {str(value)[:60]!r}, which changed the base model too.",
                "Convert it to a plain LoRA adapter: path_initial_model_for_weight_conversion in PEFT.",
            )
        neutral = key in _NEUTRAL or key == "init_lora_weights" or value in (None, False, "none", 0)
        if not neutral and value not in ({}, []):
            raise ModelError(
                f"{file}: the setting '{key[:60]}' ({str(value)[:60]}) is not supported.",
                "Merge the adapter with PEFT (merge_and_unload) and import the model that comes out.",
            )
    return settings


def _lora_config(file: Path, settings: Mapping[str, Any], base: ModelConfig) -> LoraConfig:
    """The settings as ours; names of targets are kept where they are plain."""

    def table(key: str) -> dict[str, Any]:
        found = settings.get(key) or {}
        if not isinstance(found, dict) or len(found) > _MOST_ENTRIES:
            raise FormatError(f"{file}: '{key}' should be an object.", _HINT)
        for name in found:
            if not _PLAIN.fullmatch(name):
                raise ModelError(f"{file}: {name[:60]!r} in '{key}' is no plain name of a module.")
        return found

    def listed(key: str) -> tuple[str, ...]:
        found = settings.get(key) or []
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise FormatError(f"{file}: '{key}' should be a list of names.", _HINT)
        return tuple(found)

    try:
        return LoraConfig(
            rank=settings.get("r", 8),
            alpha=settings.get("lora_alpha", 8),
            dropout=settings.get("lora_dropout", 0.0),
            rslora=settings.get("use_rslora") is True,
            targets=listed("target_modules") or (ALL_LINEAR,),
            rank_pattern=table("rank_pattern"),
            alpha_pattern=table("alpha_pattern"),
            modules_to_save=listed("modules_to_save"),
        )
    except (LexmillError, TypeError) as error:
        if isinstance(error, (FormatError, ModelError)):
            raise
        raise FormatError(f"{file}: {error}", _HINT) from error


def _read_adapter(path: Path, settings: Mapping[str, Any], config: ModelConfig) -> Adapter:
    """The tensors, by the modules that they belong to.

    Raises:
        FormatError: a name that is none of an adapter, or half of a pair; a rank other than the settings say.
    """
    if not (path / WEIGHTS_FILE).is_file() and (path / "adapter_model.bin").is_file():
        raise ModelError(
            f"{path}: the weights are in adapter_model.bin, a pickle, which can run any program when it is read.",
            "Have PEFT save them anew: save_pretrained(folder, safe_serialization=True).",
        )
    file = require_file(path / WEIGHTS_FILE, "adapter weights file", _HINT)
    lora = _lora_config(path / CONFIG_FILE, settings, config)
    modules = {_bare(layer.huggingface): layer.huggingface for layer in linear_layers(config)}
    wholes = {_bare(name.huggingface): name for name in weight_names(config)}
    halves: dict[str, dict[str, np.ndarray]] = {}
    replaced: dict[str, np.ndarray] = {}
    with SafetensorsFile.open(file) as weights:
        for name in weights.names():
            bare = _bare(name.removeprefix(_PREFIX))
            module, _, half = bare.rpartition(".lora_")
            if half in ("A.weight", "B.weight") and module in modules:
                if len(weights.shape(name)) != 2:
                    raise FormatError(f"{file}: the tensor '{name}' has {len(weights.shape(name))} axes.")
                halves.setdefault(modules[module], {})[half[0]] = weights.float32(name)
            elif bare in wholes and lora.modules_to_save:
                if wholes[bare].part != (0, 1):
                    raise ModelError(f"{file}: the whole weight '{name}' is several matrices here.")
                if config.tied and wholes[bare].own == "embed.weight":
                    raise ModelError(
                        f"{file}: it replaces the embedding of a model whose output projection is the same matrix."
                    )
                replaced[wholes[bare].own] = weights.float32(name)
            else:
                raise ModelError(
                    f"{file}: the tensor '{name[:200]}' has no place in a {config.family} model.",
                    "Is it for another model? Adapters of embeddings are not supported.",
                )
    changes = {}
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise FormatError(f"{file}: of '{module}' there is only one half, lora_{min(pair)}.", _HINT)
        rank = len(pair["A"])
        if pair["B"].shape[1] != rank or rank != lora.rank_of(module):
            raise FormatError(
                f"{file}: the adapter of '{module}' has the ranks {rank} and {pair['B'].shape[1]}, "
                f"but {CONFIG_FILE} says {lora.rank_of(module)}.",
                _HINT,
            )
        changes[module] = LowRank(pair["A"], pair["B"], lora.scale_of(module, rank))
    if not changes and not replaced:
        raise FormatError(f"{file}: the adapter is empty.", _HINT)
    return Adapter(lora, changes, replaced)


def _bare(name: str) -> str:
    """A name without the prefix that models below a head have or have not."""
    return name.removeprefix("bert.").removeprefix("model.")


def _find_base(path: Path, settings: Mapping[str, Any], lineage: Mapping[str, Any]) -> Path:
    """The model directory that an adapter names: beside it as it was when it was made, or where it was then."""
    named = [_facts(lineage).get("base"), settings.get("base_model_name_or_path")]
    for place in named:
        if not isinstance(place, str) or not place or "\0" in place:
            continue
        for candidate in (path / place, Path(place)):
            if (candidate / "config.json").is_file():
                return candidate
    said = named[1] if isinstance(named[1], str) else None
    raise FileError(
        f"{path}: the base model of this adapter, {said!r}, is not there." if said
        else f"{path}: this adapter does not say which model it is for.",
        "Tell it once: lexmill import ADAPTER --base MODEL --out DIR. A hub's model must be downloaded first.",
    )  # fmt: skip


def write_adapter(
    path: Path | str, adapter: Adapter, base: ModelDirectory, lineage: Mapping[str, Any] | None = None
) -> AdapterDirectory:
    """Write an adapter as PEFT does, and open it. Other files in the folder stay: those of its training.

    The configuration comes last, and an old one goes first: without it a folder is no adapter.

    Args:
        base: the model that it is for; its path and the hashes of its weights are noted.
        lineage: goes to `lexmill.json`.

    Raises:
        FileError: no space or no permission.
    """
    path = Path(path)
    adapter.check(base.config, str(path))
    labels = list(base.config.labels)
    facts = {
        "base": os.path.relpath(base.path.resolve(), path.resolve()),
        "base_sha256": {one.name: sha256_file(one) for one in sorted(base.path.glob("*.safetensors"))},
        **({"quantise": adapter.config.quantise} if adapter.config.quantise else {}),
        **({"labels": labels} if labels else {}),
    }
    stored = {name.own: name.huggingface for name in weight_names(base.config)}
    tensors: dict[str, np.ndarray] = {}
    for module, change in adapter.changes.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = change.a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = change.b
    tensors |= {f"{_PREFIX}{stored[own]}": weight for own, weight in adapter.replaced.items()}
    with explain_os_errors(path, "write"):
        (path / CONFIG_FILE).unlink(missing_ok=True)
    write_safetensors(path / WEIGHTS_FILE, tensors)
    write_json(path / LINEAGE_FILE, {**(lineage or {}), "adapter": facts})
    write_json(path / CONFIG_FILE, _settings(adapter, base, stored))
    return AdapterDirectory.open(path, base)


def _settings(adapter: Adapter, base: ModelDirectory, stored: Mapping[str, str]) -> dict[str, Any]:
    """`adapter_config.json`: what PEFT needs, and nothing of what it fills in itself."""
    lora = adapter.config
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": _HEAD_TASKS["labels"]
        if base.config.labels
        else _HEAD_TASKS["span"]
        if base.config.span
        else _TASKS[base.config.shape],
        "base_model_name_or_path": str(base.path.resolve()),
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        # in full: what "all-linear" means is decided here, not by the version of PEFT that reads it
        "target_modules": sorted(adapter.changes),
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "modules_to_save": sorted({stored[own].rpartition(".")[0] for own in adapter.replaced}) or None,
    }
