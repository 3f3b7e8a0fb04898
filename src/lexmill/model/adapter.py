"""Low-rank adapters as numbers: what is adapted, by which product of two thin matrices. Free of torch.

LoRA: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". A layer with the weight W gives
W x + scale B (A x); scale is alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA (Kalajdzievski
2023). Names of modules and the meaning of settings are those of PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from lexmill.config import suggest
from lexmill.errors import ConfigError, FormatError, ModelError
from lexmill.model.config import ModelConfig
from lexmill.model.names import LinearLayer, linear_layers, weight_names, weight_shapes

ALL_LINEAR = "all-linear"
_OUTPUTS = ("head", "label", "span")  # projections that give a model's answers
QUANTISED_TYPES = ("q8_0", "q4_1", "q4_0")  # in which a base may be kept: types of GGUF files


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What is adapted, and how: the `[finetune.lora]` table of a recipe, and `adapter_config.json` in short.

    Modules are Hugging Face's: "q_proj" means each module whose path is that or ends in ".q_proj".
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # on what goes into A, in training
    rslora: bool = False  # alpha / sqrt(rank), so that a higher rank does not learn more slowly
    targets: tuple[str, ...] = (ALL_LINEAR,)  # all-linear: every one but output projections
    rank_pattern: dict = field(default_factory=dict)  # other ranks for some modules: {"down_proj": 32}
    alpha_pattern: dict = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()  # trained in full, and saved as they are
    quantise: str = ""  # keep the base in 8 or 4 bits while training: "q8_0", "q4_1" or "q4_0"

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("'targets' names no module.", f'Take names like "q_proj", or "{ALL_LINEAR}".')
        for name, ranks in (("rank", [self.rank]), ("rank_pattern", list(self.rank_pattern.values()))):
            for rank in ranks:
                if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                    raise ConfigError(f"'{name}' must be a whole number from 1, but is {rank!r}.")
        for name, alphas in (("alpha", [self.alpha]), ("alpha_pattern", list(self.alpha_pattern.values()))):
            for alpha in alphas:
                real = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
                if not (real and math.isfinite(alpha) and alpha > 0):
                    raise ConfigError(f"'{name}' must be a positive number, but is {alpha!r}.")
        if self.quantise and self.quantise not in QUANTISED_TYPES:
            raise ConfigError(
                f"A base cannot be kept in '{self.quantise}'.", suggest(self.quantise, QUANTISED_TYPES)
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"'dropout' must lie in [0, 1), but is {self.dropout}.")

    def rank_of(self, module: str) -> int:
        """The rank for a module, by Hugging Face's name."""
        return next((rank for key, rank in self.rank_pattern.items() if names(key, module)), self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """What B A is multiplied by."""
        alpha = next(
            (alpha for key, alpha in self.alpha_pattern.items() if names(key, module)), float(self.alpha)
        )
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def adapted(self, config: ModelConfig) -> list[LinearLayer]:
        """The layers of a model that get an adapter.

        Raises:
            ConfigError: a target or pattern that names no linear layer of the model.
        """
        layers = linear_layers(config)
        every = [layer.huggingface for layer in layers]
        for key in (*self.targets, *self.rank_pattern, *self.alpha_pattern):
            if key != ALL_LINEAR and not any(names(key, module) for module in every):
                raise _no_such_module(key, config, every)
        return [
            layer
            for layer in layers
            if any(names(key, layer.huggingface) for key in self.targets)
            or (
                ALL_LINEAR in self.targets
                and layer.owns[0] not in _OUTPUTS
                and not any(layer.huggingface.endswith(key) for key in self.modules_to_save)
            )
        ]

    def saved(self, config: ModelConfig) -> list[str]:
        """Our names of the weights that are trained in full.

        Raises:
            ConfigError: a module that the model does not have, or one that shares its weight.
        """
        modules = {name.own: name.huggingface.rpartition(".")[0] for name in weight_names(config)}
        found = []
        for key in self.modules_to_save:
            owns = [own for own, module in modules.items() if module.endswith(key)]  # as PEFT has it
            if not owns:
                raise _no_such_module(key, config, sorted(set(modules.values())))
            if config.tied and "embed.weight" in owns:
                raise ConfigError(
                    f"'modules_to_save' names '{key}', which is the embedding and the output projection in one.",
                    "PEFT would part them; lexmill does not.",
                )
            found += owns
        return found


def names(key: str, module: str) -> bool:
    """Whether a name from a list of modules means this one, as PEFT reads such lists; "^" begins a full path."""
    if key.startswith("^"):
        return module == key[1:]
    return module == key or module.endswith(f".{key}")


def _no_such_module(key: str, config: ModelConfig, modules: list[str]) -> ConfigError:
    hint = suggest(key, sorted({module.rpartition(".")[2] for module in modules}))
    if config.tied and key == "lm_head":
        hint = "The output projection of this model is its embedding, which is no linear layer."
    return ConfigError(f"There is no module '{key}' that could be adapted in a {config.family} model.", hint)


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one of Hugging Face's modules: scale · b a.

    Attributes:
        a: (rank, inputs), float32.
        b: (outputs, rank), float32.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter changes in a model.

    Attributes:
        config: how it was made; what it is, the arrays say.
        changes: by Hugging Face's names of modules.
        replaced: whole weights, by our names.
    """

    config: LoraConfig
    changes: Mapping[str, LowRank]
    replaced: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        pairs = sum(change.a.size + change.b.size for change in self.changes.values())
        return pairs + sum(weight.size for weight in self.replaced.values())

    def check(self, config: ModelConfig, where: str) -> None:
        """Refuse an adapter that does not fit a model.

        Raises:
            ModelError: a module or a shape that the model does not have.
            FormatError: something that is no number.
        """
        layers = {layer.huggingface: layer for layer in linear_layers(config)}
        hint = "Is it the model that the adapter was made for? Name that one with --base."
        for module, change in self.changes.items():
            layer = layers.get(module)
            if layer is None:
                raise ModelError(f"{where}: the base has no linear layer '{module}'.", hint)
            if change.a.shape[1:] != (layer.inputs,) or change.b.shape[:1] != (layer.outputs,):
                raise ModelError(
                    f"{where}: the adapter of '{module}' has the shapes {change.a.shape} and {change.b.shape}, "
                    f"but the layer has {layer.inputs:,} inputs and {layer.outputs:,} outputs.",
                    hint,
                )
            if not (np.isfinite(change.a).all() and np.isfinite(change.b).all()):
                raise FormatError(f"{where}: the adapter of '{module}' holds something that is no number.")
        shapes = weight_shapes(config)
        for own, weight in self.replaced.items():
            if weight.shape != shapes.get(own):
                raise ModelError(f"{where}: the weight for '{own}' has the shape {weight.shape}.", hint)
            if not np.isfinite(weight).all():
                raise FormatError(f"{where}: the weight for '{own}' holds something that is no number.")


class MergedWeights(Mapping[str, np.ndarray]):
    """A model's weights with an adapter in them, by our names, float32, made when they are asked for.

    Args:
        base: gives a weight of the base, float32.
    """

    def __init__(self, config: ModelConfig, base: Callable[[str], np.ndarray], adapter: Adapter) -> None:
        self.base, self._adapter = base, adapter
        self._names = [name.own for name in weight_names(config)]
        self._places: dict[str, tuple[str, slice]] = {}
        for layer in linear_layers(config):
            start = 0
            for own, rows in zip(layer.owns, layer.rows):
                if layer.huggingface in adapter.changes:
                    self._places[f"{own}.weight"] = layer.huggingface, slice(start, start + rows)
                start += rows

    def change(self, own: str) -> np.ndarray | None:
        """What the adapter adds to a weight, float32; None where it adds nothing."""
        if own not in self._places:
            return None
        module, rows = self._places[own]
        change = self._adapter.changes[module]
        # the sum in float64: merged weights are as near to the unmerged model as float32 allows
        product = change.b[rows].astype(np.float64) @ change.a.astype(np.float64)
        return (product * change.scale).astype(np.float32)

    def __getitem__(self, own: str) -> np.ndarray:
        if own in self._adapter.replaced:
            return self._adapter.replaced[own]
        weight, change = self.base(own), self.change(own)
        return weight if change is None else weight + change

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
