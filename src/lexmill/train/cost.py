"""What training a model costs, from its shape alone: weights, products, memory. Nothing is built or measured here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from lexmill.formats.blocks import BLOCK_TYPES
from lexmill.model.adapter import LoraConfig
from lexmill.model.config import ModelConfig
from lexmill.model.kernels import KERNELS
from lexmill.model.names import matrices_in_blocks, weight_shapes
from lexmill.train.optimizers import is_hidden
from lexmill.train.parallel import Sharding

_FLOAT = 4  # bytes; weights, gradients and optimiser state are float32 in every precision
_LOGIT_ROWS = 1024  # positions whose logits exist at the same time (`cross_entropy`)
_DATA_BYTES = 120  # a token: 30 in the rows of this epoch, 90 while those of the next are made (measured)
_NEWTON_SCHULZ = 5  # steps of Muon's iteration
_TABLES = ("embed.weight", "relative.weight")  # weights that are looked up, not multiplied


@dataclass(frozen=True)
class Row:
    """What a training row holds, on average.

    Attributes:
        length: tokens that are read; `decoder_length` those that are written, in an encoder–decoder.
        targets: places whose prediction counts: only those go through the head.
        documents: examples that share a row.
        pairs: of them, pairs of texts for a next-sentence head.
    """

    length: int
    targets: float
    decoder_length: int = 0
    documents: float = 2.0
    pairs: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens that the model computes on."""
        return self.length + self.decoder_length


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights.

    Attributes:
        total: all, a tied embedding counted once.
        embeddings: in tables that are looked up: words, learned positions, segments, relative biases.
        matrices: in matrices that hidden states are multiplied with; an untied head is one of them.
        head: in the output projection, tied or not: it is multiplied with, whatever it is counted as.
    """

    total: int
    embeddings: int
    matrices: int
    head: int


def count_parameters(config: ModelConfig) -> Parameters:
    """The weights of a model of this shape."""
    shapes = weight_shapes(config)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    tables = sum(size for name, size in sizes.items() if name.endswith(_TABLES))
    matrices = sum(
        size for name, size in sizes.items() if len(shapes[name]) == 2 and not name.endswith(_TABLES)
    )
    return Parameters(sum(sizes.values()), tables, matrices, config.vocab_size * config.width)


@dataclass(frozen=True)
class AdapterCost:
    """What makes a run of an adapter cheaper: only the adapter learns.

    Attributes:
        weights: numbers in it.
        base_bytes: of the model's own weights in memory, quantised or not.
    """

    weights: int
    base_bytes: int


def adapter_cost(config: ModelConfig, lora: LoraConfig, in_bfloat16: Collection[str] = ()) -> AdapterCost:
    """The adapter that a run with these settings trains.

    Args:
        in_bfloat16: our names of the base's weights that lie in memory so.

    Raises:
        ConfigError: it names a module that the model does not have.
    """
    shapes = weight_shapes(config)
    pairs = sum(
        lora.rank_of(layer.huggingface) * (layer.inputs + layer.outputs) for layer in lora.adapted(config)
    )
    whole = sum(math.prod(shapes[own]) for own in lora.saved(config))
    kind = BLOCK_TYPES[lora.quantise.upper()] if lora.quantise else None
    inside = matrices_in_blocks(config)

    def size(own: str, shape: tuple[int, ...]) -> int:
        if kind and own in inside and kind.fits(shape):
            return kind.byte_size(shape)
        return (_FLOAT // 2 if own in in_bfloat16 else _FLOAT) * math.prod(shape)

    return AdapterCost(pairs + whole, sum(size(own, shape) for own, shape in shapes.items()))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of training, forward and back; a multiply-add counts as two."""

    matrices: float
    attention: float

    @property
    def total(self) -> float:
        return self.matrices + self.attention


def row_flops(config: ModelConfig, row: Row, adapter: AdapterCost | None = None) -> Flops:
    """What a row costs: 6 a weight for each place that is multiplied with it, and attention's products.

    2 for the product, 4 for the gradients of its two factors (Kaplan et al. 2020, section 2.1). A weight
    that does not learn costs 4, and the adapter's own come on top.
    Attention counts the pairs of query and key that may be looked at as if a row were one text; what
    packing hides is multiplied all the same. Norms, activations and the optimiser are not counted.
    """
    matrices = sum(
        math.prod(shape) * _places(name, config, row)
        for name, shape in weight_shapes(config).items()
        if len(shape) == 2 and (not name.endswith(_TABLES) or name == "embed.weight")
    )
    # two products forward and four back, each 2 x (width of all heads) a pair of query and key
    attention = 12 * config.heads * config.head_width * _query_key_pairs(config, row)
    if adapter is not None:
        return Flops(4.0 * matrices + 6.0 * adapter.weights * row.tokens, float(attention))
    return Flops(6.0 * matrices, float(attention))


def _places(name: str, config: ModelConfig, row: Row) -> float:
    """How many places of a row a matrix is multiplied with."""
    if name == "embed.weight":
        return row.targets if config.tied else 0
    if name.startswith(("head.", "mlm.")):
        return row.targets
    if name.startswith(("pooler.", "nsp.", "label.")) or (config.labels and name.startswith("transform.")):
        return row.pairs
    if config.shape == "encoder_decoder" and name.startswith("decoder."):
        return row.length if ".cross.k." in name or ".cross.v." in name else row.decoder_length
    return row.length


def _query_key_pairs(config: ModelConfig, row: Row) -> int:
    """Pairs of query and key that may be looked at, over all layers."""
    length, written = row.length, row.decoder_length
    if config.shape == "decoder":
        return config.layers * _causal(length)
    if config.shape == "encoder_decoder":
        decoder = _causal(written) + written * length
        return config.layers * length**2 + config.decoder_layers * decoder
    side = min(config.local_window // 2, length - 1)
    local = length + 2 * (side * length - side * (side + 1) // 2)
    return sum(local if config.is_local(layer) else length**2 for layer in range(config.layers))


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def optimizer_flops(config: ModelConfig, optimizer: str) -> float:
    """What one update costs beside the gradients: Muon's products. AdamW has none."""
    total = 0
    for shape in _hidden_shapes(config, optimizer):
        low, high = min(shape), max(shape)
        # gram = x xᵀ, gram², and their sum times x
        total += 2 * _NEWTON_SCHULZ * (2 * low * low * high + low**3)
    return float(total)


def _hidden_shapes(config: ModelConfig, optimizer: str) -> list[tuple[int, ...]]:
    """The matrices that Muon moves."""
    if optimizer != "muon":
        return []
    return [shape for name, shape in weight_shapes(config).items() if is_hidden(name, len(shape))]


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs at its fullest, by what they are for.

    Attributes:
        weights, gradients: float32.
        optimizer: its state; Muon has one momentum a weight, AdamW two moments.
        gathered: of a sharded model, the layers that are whole for a moment.
        step: what comes and goes in a step: activations and gradients of activations, or what the
            optimiser works with, if that is more.
        program: Python, torch, and what else is loaded.
        data: the packed rows of this epoch, and the next being made.
        checkpoint: the copy that is written beside training.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    step: int
    program: int = 0
    data: int = 0
    checkpoint: int = 0

    @property
    def model(self) -> int:
        """What does not depend on the number of rows."""
        return self.weights + self.gradients + self.optimizer + self.gathered

    @property
    def total(self) -> int:
        return self.model + self.step + self.program + self.data + self.checkpoint

    @property
    def on_device(self) -> int:
        """What lies in a GPU's memory, where there is one."""
        return self.model + self.step


def process_memory(
    config: ModelConfig,
    row: Row,
    *,
    optimizer: str,
    precision: str,
    rows_at_once: int,
    parts: int = 1,
    world: int = 1,
    sharding: Sharding = "replicate",
    correction: float = 1.0,
    program: int = 0,
    data_tokens: int = 0,
    adapter: AdapterCost | None = None,
    recompute: bool = False,
) -> Memory:
    """What one of `world` processes needs.

    Args:
        rows_at_once: rows whose activations exist together.
        parts: of a step of one process.
        correction: measured memory of a step by the estimated one.
        program: bytes of the process before it builds anything.
        data_tokens: in an epoch; 0 where that is not known.
        adapter: if not the model learns but this.
        recompute: whether blocks are computed again on the way back.
    """
    total = learning_numbers(config, adapter)
    state = optimizer_numbers(config, optimizer, adapter)
    frozen = adapter.base_bytes if adapter else 0
    spread = world if sharding == "shard" else 1
    # gradients of parts are added up before they are exchanged, and stay whole until then
    gradients = total if parts > 1 else total / spread
    gathered = _gathered(config) if spread > 1 else 0
    step = correction * max(
        activation_bytes(config, row, rows_at_once, precision, adapter is not None, recompute),
        0 if adapter else _update_bytes(config, optimizer),
    )
    return Memory(
        weights=math.ceil((_FLOAT * total + frozen) / spread),
        gradients=math.ceil(_FLOAT * gradients),
        optimizer=math.ceil(_FLOAT * state / spread),
        gathered=gathered,
        step=math.ceil(step),
        program=program,
        data=_DATA_BYTES * data_tokens,
        # a sharded model's parts are written from where they lie
        checkpoint=0 if spread > 1 else _FLOAT * (total + state),
    )


def learning_numbers(config: ModelConfig, adapter: AdapterCost | None = None) -> int:
    """How many weights learn."""
    return adapter.weights if adapter else count_parameters(config).total


def optimizer_numbers(config: ModelConfig, optimizer: str, adapter: AdapterCost | None = None) -> int:
    """Float32 numbers of optimiser state."""
    if adapter:
        return adapter.weights * (1 if optimizer == "muon" else 2)
    momentum = sum(math.prod(shape) for shape in _hidden_shapes(config, optimizer))
    return momentum + 2 * (count_parameters(config).total - momentum)


def checkpoint_bytes(config: ModelConfig, optimizer: str, adapter: AdapterCost | None = None) -> int:
    """One checkpoint on disk: what learns, and its optimiser state."""
    return _FLOAT * (learning_numbers(config, adapter) + optimizer_numbers(config, optimizer, adapter))


def _gathered(config: ModelConfig) -> int:
    """Bytes of what FSDP makes whole: weights and gradients of what is outside of blocks, and of two blocks."""
    blocks: Counter[str] = Counter()
    outside = 0
    for name, shape in weight_shapes(config).items():
        if ".blocks." in name:
            side, _, rest = name.partition(".blocks.")
            blocks[f"{side} {rest.partition('.')[0]}"] += math.prod(shape)
        else:
            outside += math.prod(shape)
    return 2 * _FLOAT * (outside + 2 * max(blocks.values()))


def _update_bytes(config: ModelConfig, optimizer: str) -> int:
    """What Muon works with at once: matrices of equal shape, about five times over."""
    together = Counter(_hidden_shapes(config, optimizer))
    return max((5 * _FLOAT * count * math.prod(shape) for shape, count in together.items()), default=0)


def activation_bytes(
    config: ModelConfig, row: Row, rows: int, precision: str, frozen: bool = False, recompute: bool = False
) -> int:
    """What a forward and backward pass over `rows` rows holds beside weights and gradients, about.

    What each layer keeps for the way back, as `lexmill.model` computes on a CPU: in bfloat16 the
    residual stream stays float32. On top comes the layer whose gradients are being found. The
    calibration of `lexmill.train.forecast` tells how far this is from the truth.
    """
    size = 2 if precision == "bfloat16" else _FLOAT
    read, written = rows * row.length, rows * row.decoder_length
    sides = [(config.layers, read, row.length), (config.decoder_layers, written, row.decoder_length)]
    kept, largest = 0.0, 0.0
    for side, (layers, tokens, keys) in enumerate(sides):
        layer = tokens * _layer_bytes(config, keys, size)
        if side == 1:  # cross-attention, whose keys and values are those of the tokens that were read
            layer += tokens * _attention_bytes(config, row.length, size) + read * 2 * _heads(config) * size
        # a block that is computed again keeps only what goes into it: the stream, and a branch or copy beside it
        kept += layers * (tokens * config.width * (_FLOAT + size) if recompute else layer)
        largest = max(largest, layer)
    places = rows * row.targets
    block = min(places, _LOGIT_ROWS)
    # hidden states that go into the head with their gradients, some rows of logits three times over
    head = places * config.width * 3 * size + block * config.vocab_size * (2 * _FLOAT + size)
    # the head's gradient, found with the loss and kept until the way back scales it
    weight = 0 if frozen else 2 * _FLOAT * config.vocab_size * config.width
    parameters = count_parameters(config)
    copies = _FLOAT * _joined(config)
    if size == 2:  # frozen matrices lie in 16 bits, but for the head
        copies = 2 * (parameters.head if frozen else parameters.matrices)
    stream = 2 * (read + written) * config.width * _FLOAT
    return math.ceil(kept + largest + head + weight + copies + stream)


def _heads(config: ModelConfig) -> int:
    return config.heads * config.head_width


def _joined(config: ModelConfig) -> int:
    """Numbers in the copies that lay queries', keys' and values' matrices side by side."""
    wide = _heads(config) + 2 * config.kv_heads * config.head_width
    return (config.layers + config.decoder_layers) * config.width * wide


def _layer_bytes(config: ModelConfig, keys: int, size: int) -> float:
    """Bytes a token of what a block without cross-attention keeps."""
    norm = config.width * (2 * _FLOAT + (size if size != _FLOAT else 0))
    inside = (4 if config.gated else 2) * config.mlp_width * size
    return _attention_bytes(config, keys, size) + norm + inside


def _attention_bytes(config: ModelConfig, keys: int, size: int) -> float:
    """Bytes a query of what attention keeps: norm, queries, keys and values, weights, what was gathered.

    Compiled attention, in bfloat16, keeps a sum for each head instead of weights.
    """
    norm = config.width * (2 * _FLOAT + (size if size != _FLOAT else 0))
    vectors = 2 * _heads(config) + 2 * config.kv_heads * config.head_width
    compiled = size != _FLOAT and KERNELS is not None and KERNELS.attends
    weights = config.heads * (_FLOAT if compiled else size * keys)
    return norm + size * vectors + weights
