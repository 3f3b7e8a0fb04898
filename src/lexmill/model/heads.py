"""Another head on the same model: what fine-tuning for a task begins with. Free of torch.

A model has the heads that Hugging Face's class of its family has. A BERT that begins to classify loses the heads for
masked words and next sentences and keeps its pooler; one that begins to find answers, or to embed texts, loses them
all but keeps what stands below. A ModernBERT keeps the dense layer and norm of its masked-language-modelling head
below the new projection, because its classes share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lexmill.errors import ModelError
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory
from lexmill.model.names import weight_names, weight_shapes

HEADS = ("label.", "span.", "transform.")  # what belongs to a task, by our names
_DEVIATION = 0.02  # of fresh weights (Devlin et al. 2019)


def with_labels(model: ModelDirectory, labels: Sequence[str], seed: int = 0) -> ModelDirectory:
    """The model with a head that tells these labels apart; its own where it has one that knows them all.

    Raises:
        ModelError: no encoder.
    """
    config = _encoder(model, "classification")
    if config.labels and set(labels) <= set(config.labels):
        return model
    return _begin(model, replace(_bare(config), labels=tuple(labels), pooler=config.family == "bert"), seed)


def with_span(model: ModelDirectory, seed: int = 0) -> ModelDirectory:
    """The model with a head that finds answers; its own where it has one.

    Raises:
        ModelError: no encoder.
    """
    config = _encoder(model, "finding answers in a text")
    return model if config.span else _begin(model, replace(_bare(config), span=True, pooler=False), seed)


def without_heads(model: ModelDirectory) -> ModelDirectory:
    """The model without any head; a pooler stays.

    Raises:
        ModelError: no encoder.
    """
    config = _encoder(model, "training embeddings")
    bare = replace(_bare(config), mlm_bias=False)
    return model if bare == config else _begin(model, bare, 0)


def head_modules(model: ModelDirectory) -> tuple[str, ...]:
    """Hugging Face's names of the modules that an adapter trains in full: the task's head, and what has just begun."""
    modules = {
        name.huggingface.rpartition(".")[0]
        for name in weight_names(model.config)
        if name.own.startswith(HEADS) or name.own in model.begun
    }
    return tuple(sorted(modules))


def _encoder(model: ModelDirectory, what: str) -> ModelConfig:
    if model.config.shape != "encoder":
        raise ModelError(
            f"{model.path}: {what} needs an encoder; this model has the shape '{model.config.shape}'.",
            "Families of encoders are bert and modernbert.",
        )
    return model.config


def _bare(config: ModelConfig) -> ModelConfig:
    shared = config.mlm_bias and config.family == "modernbert"
    return replace(config, mlm=False, nsp=False, labels=(), span=False, mlm_bias=shared)


def _begin(model: ModelDirectory, config: ModelConfig, seed: int) -> ModelDirectory:
    """The model with the heads of `config`; what its files do not hold begins as in BERT, the same for a seed."""
    shapes, begun = weight_shapes(config), {}
    for index, name in enumerate(weight_names(config)):
        # the projection is of another task, even where the files have one of the same name
        projection = name.own.startswith(("label.", "span."))
        if not projection and model.holds(name):
            continue
        shape = shapes[name.own]
        if name.own.endswith("bias"):
            weight = np.zeros(shape)
        elif len(shape) == 1:
            weight = np.ones(shape)
        else:
            weight = _DEVIATION * np.random.default_rng([seed, index]).standard_normal(shape)
        begun[name.own] = weight.astype(np.float32)
    return model.with_config(config, begun)
