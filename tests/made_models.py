"""Small models of every family with random weights around trained tokenizers, made when they are asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conftest import randomise

from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

_OPTIONS = {"unigram": {"sentinels": 10}, "wordpiece": {"lowercase": True}}


def model_maker(
    folder: Path, prose: str, shape: Mapping[str, Any], kinds: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> Callable[[str], ModelDirectory]:
    """A function that gives the model of a name, each made once.

    Args:
        shape: sizes that all of them share.
        kinds: of each name, the kind of tokenizer and the flags that differ.
    """
    from lexmill.model.build import build_model
    from lexmill.model.config import ModelConfig

    made, tokenizers = {}, {}

    def get(name):
        kind, flags = kinds[name]
        if kind not in tokenizers:
            config = TokenizerConfig(kind=kind, vocab_size=500, **_OPTIONS.get(kind, {}))
            tokenizers[kind] = train_tokenizer([prose[:60_000]], config)
        if name not in made:
            config = ModelConfig(**{**shape, **flags})
            weights = randomise(build_model(config)).weights()
            made[name] = write_model_directory(folder / name, config, weights, tokenizers[kind])
        return made[name]

    return get
