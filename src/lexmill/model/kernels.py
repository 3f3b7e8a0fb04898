"""The compiled steps of training on CPUs (`native/training.cpp`), as functions over tensors.

`KERNELS` is None where they were not built, where torch runs on another OpenMP than they can use, or
where the environment variable LEXMILL_NATIVE is "0"; then torch's own operations do the same, slower.
Nothing is checked in the compiled code: callers ask `kernels_for`, and pass dense tensors of fitting shapes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexmill.devices import compiled_module, left_out

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
DTYPES = (torch.float32, torch.bfloat16)
_MODULE = "_kernels"
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def _struct(
    name: str, numbers: str, addresses: str, factor: str = "", first: tuple[str, Any] | None = None
) -> Any:
    """A struct of `native/training.h`: whole numbers, then addresses, then perhaps one real number."""
    fields: list[tuple[str, Any]] = [] if first is None else [first]
    fields += [(field, c_int64) for field in numbers.split()]
    fields += [(field, c_void_p) for field in addresses.split()]
    fields += [(field, c_float) for field in factor.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _strides(*tensors: str) -> str:
    return " ".join(f"{tensor}_{axis}" for tensor in tensors for axis in ("batch", "head", "time"))


_STRUCTS = {
    "add_norm": _struct(
        "AddNorm",
        "rows width centred x_bf16 branch_bf16 normed_bf16",
        "x branch weight bias sum normed stream mean inverse",
        "eps",
    ),
    "add_norm_back": _struct(
        "AddNormBack",
        "rows width centred x_bf16 normed_bf16",
        "x weight mean inverse from_sum from_normed from_stream to_x to_branch to_weight to_bias",
    ),
    "gated": _struct("Gated", "count is_bf16 activation", "gate up out"),
    "gated_back": _struct("GatedBack", "count is_bf16 activation", "gate up gradient to_gate to_up"),
    "rotate": _struct(
        "Rotate",
        "batch time heads width tables is_bf16 x_batch x_time x_head y_batch y_time y_head",
        "x y cos sin",
        "sign",
    ),
    "softmax": _struct("Softmax", "rows keys queries causal is_bf16", "scores", "scale"),
    "softmax_back": _struct("SoftmaxBack", "rows keys is_bf16", "share gradient", "scale"),
    "cross_entropy": _struct("CrossEntropy", "rows vocabulary is_bf16", "logits targets bias lost"),
    "attention": _struct(
        "Attention",
        "batch heads kv_heads queries keys width causal masks " + _strides("q", "k", "v", "out"),
        "q k v out log_sums mask bias",
        "scale",
    ),
}
_STRUCTS["weight_gradient"] = _struct(
    "WeightGradient", "rows outputs inputs gradient_row x_row", "gradient x to_weight to_bias"
)
_STRUCTS["attention_back"] = _struct(
    "AttentionBack",
    _strides("gradient", "to_q", "to_k", "to_v"),
    "gradient to_q to_k to_v to_bias",
    first=("forward", _STRUCTS["attention"]),
)


class Kernels:
    """The compiled steps; each method writes into tensors that it makes or, where said, in place."""

    def __init__(self, library: ctypes.CDLL, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        self._calls = {name: getattr(library, f"lexmill_{name}") for name in _STRUCTS}
        for name, call in self._calls.items():
            call.argtypes, call.restype = [POINTER(_STRUCTS[name]), ctypes.c_int], None

    @property
    def attends(self) -> bool:
        """Whether there is compiled attention."""
        return self.instruction_set in ("avx512_bf16", "amx")

    @property
    def finds_weight_gradients(self) -> bool:
        """Whether there is `weight_gradient`."""
        return self.instruction_set == "amx"

    def _run(self, name: str, *values: Any) -> None:
        self._call(name, _STRUCTS[name](*values))

    def _call(self, name: str, struct: Any) -> None:
        self._calls[name](struct, torch.get_num_threads())

    def add_norm(
        self,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        *,
        centred: bool,
        exact: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The layer norm of x + branch, or, not `centred`, its RMS norm.

        Args:
            x: (rows, width); with a branch, float32.
            branch: the same shape, of either type.
            weight, bias: (width,), float32.
            dtype: of the norm.
            exact: give it in float32 as well, where `dtype` is another.

        Returns:
            The sum (without a branch x itself), the norm, perhaps that in float32, and each row's mean and
            inverse deviation, (2, rows), for the way back.
        """
        rows, width = x.shape
        total, to_sum = (x, None) if branch is None else (torch.empty_like(x),) * 2
        normed, statistics = torch.empty(rows, width, dtype=dtype), torch.empty(2, rows)
        before = torch.empty(rows, width) if exact and dtype != torch.float32 else None
        sizes = rows, width, centred, _is_bf16(x), branch is not None and _is_bf16(branch), _is_bf16(normed)
        tensors = x, branch, weight, bias, to_sum, normed, before, *statistics
        self._run("add_norm", *sizes, *map(_address, tensors), eps)
        return total, normed, before, statistics

    def add_norm_back(
        self,
        total: Tensor,
        weight: Tensor,
        statistics: Tensor,
        gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
        branch: torch.dtype,
        *,
        centred: bool,
        biased: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradients of x, of the branch in the type `branch`, of the weight and of the bias.

        Args:
            total, statistics: as `add_norm` gave them.
            gradients: of the sum, the norm, and that in float32, one of the last two at least.
        """
        to_x, to_weight = torch.empty_like(total), torch.empty_like(weight)
        to_branch = None if branch == total.dtype else torch.empty_like(total, dtype=branch)
        to_bias = torch.empty_like(weight) if biased else None
        normed = gradients[1]
        sizes = *total.shape, centred, _is_bf16(total), normed is not None and _is_bf16(normed)
        tensors = total, weight, *statistics, *gradients, to_x, to_branch, to_weight, to_bias
        self._run("add_norm_back", *sizes, *map(_address, tensors))
        return to_x, to_x if to_branch is None else to_branch, to_weight, to_bias

    def gated(self, gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
        """act(gate) * up; all of one shape and type. Without `up`, act(gate)."""
        out = torch.empty_like(gate)
        gate_at, out_at = _addresses(gate, out)
        self._run("gated", gate.numel(), _is_bf16(gate), activation, gate_at, _address(up), out_at)
        return out

    def gated_back(
        self, gate: Tensor, up: Tensor | None, gradient: Tensor, activation: int
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of gate and up."""
        to_gate, to_up = torch.empty_like(gate), None if up is None else torch.empty_like(up)
        gate_at, gradient_at, to_gate_at = _addresses(gate, gradient, to_gate)
        addresses = gate_at, _address(up), gradient_at, to_gate_at, _address(to_up)
        self._run("gated_back", gate.numel(), _is_bf16(gate), activation, *addresses)
        return to_gate, to_up

    def rotate(self, x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
        """Turn each pair (i, i + D/2) of the last axis into `out`, which may be x, forward (sign 1) or back (-1).

        Args:
            x, out: (batch, time, heads, D), the last axis dense.
            cos, sin: (batch or 1, time, D / 2), float32.
        """
        sizes = (*x.shape, len(cos), _is_bf16(x), *x.stride()[:3], *out.stride()[:3])
        self._run("rotate", *sizes, *_addresses(x, out, cos, sin, dense=False), sign)

    def softmax(self, scores: Tensor, queries: int, scale: float, *, causal: bool) -> None:
        """softmax(scale * scores) in place.

        Args:
            scores: (…, rows, keys); rows are blocks of `queries`. With `causal` the last of a block sees
                all keys, each one before it one less.
        """
        keys = scores.shape[-1]
        sizes = scores.numel() // keys, keys, queries, causal, _is_bf16(scores)
        self._run("softmax", *sizes, *_addresses(scores), scale)

    def softmax_back(self, share: Tensor, gradient: Tensor, scale: float) -> None:
        """The gradient of the scores, in the place of that of the shares."""
        keys = share.shape[-1]
        sizes = share.numel() // keys, keys, _is_bf16(share)
        self._run("softmax_back", *sizes, *_addresses(share, gradient), scale)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """softmax(scale * Q Kᵀ + bias) V, (batch, heads, queries, head_width), in memory (batch, queries, heads, …).

        Args:
            q, k, v: (batch, heads or kv_heads, queries or keys, head_width), bfloat16, the last axis dense.
            mask: (batch or 1, keys, queries) booleans: what is seen; instead of `causal`.
            bias: (heads, keys, queries), float32.

        Returns:
            The result, and for the way back the logarithm of each query's sum, (batch, heads, queries).
        """
        out, log_sums = _heads_last(q), torch.empty(q.shape[:3])
        self._call("attention", _attention(q, k, v, out, log_sums, scale, mask, bias, causal))
        return out, log_sums

    def attention_back(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        log_sums: Tensor,
        gradient: Tensor,
        scale: float,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        with_bias: bool = False,
        into: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradients of q, k, v, and with `with_bias` of the bias.

        Args:
            out, log_sums: as `attention` gave them; the others as it got them.
            gradient: of the result, the last axis dense.
            into: where those of q, k and v shall lie, the last axis dense; in new tensors when not given.
        """
        to_q, to_k, to_v = into or [_heads_last(tensor) for tensor in (q, k, v)]
        to_bias = torch.empty_like(bias) if bias is not None and with_bias else None
        tensors = gradient, to_q, to_k, to_v
        self._run(
            "attention_back",
            _attention(q, k, v, out, log_sums, scale, mask, bias, causal),
            *_strides_of(*tensors),
            *_addresses(*tensors, dense=False),
            _address(to_bias),
        )
        return to_q, to_k, to_v, to_bias

    def weight_gradient(self, gradient: Tensor, x: Tensor, *, biased: bool) -> tuple[Tensor, Tensor | None]:
        """The gradients, in float32, of a linear layer's weight, (outputs, inputs), and bias, (outputs,).

        Args:
            gradient: (rows, outputs), bfloat16, the last axis dense.
            x: (rows, inputs), likewise.
        """
        rows, outputs, inputs = *gradient.shape, x.shape[1]
        to_weight, to_bias = torch.empty(outputs, inputs), torch.empty(outputs) if biased else None
        sizes = rows, outputs, inputs, gradient.stride(0), x.stride(0)
        addresses = *_addresses(gradient, x, dense=False), *map(_address, (to_weight, to_bias))
        self._run("weight_gradient", *sizes, *addresses)
        return to_weight, to_bias

    def cross_entropy(self, logits: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        """The cross-entropy of each row, (rows,) in nats; the logits become their gradient.

        Args:
            logits: (rows, vocabulary), without the bias.
            targets: (rows,), int64, valid ids; negative where the loss and its gradient are 0.
            bias: (vocabulary,), float32.
        """
        lost = torch.empty(len(logits))
        logits_at, targets_at, lost_at = _addresses(logits, targets, lost)
        addresses = logits_at, targets_at, _address(bias), lost_at
        self._run("cross_entropy", *logits.shape, _is_bf16(logits), *addresses)
        return lost


def _is_bf16(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def _addresses(*tensors: Tensor, dense: bool = True) -> tuple[int, ...]:
    assert not dense or all(tensor.is_contiguous() for tensor in tensors)
    return tuple(tensor.data_ptr() for tensor in tensors)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    scale: float,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
) -> Any:
    """The struct that attention and its way back share; it does not hold on to the tensors."""
    batch, heads, queries, width = q.shape
    sizes = batch, heads, k.shape[1], queries, k.shape[2], width, causal, 0 if mask is None else len(mask)
    addresses = *_addresses(q, k, v, out, dense=False), *map(_address, (log_sums, mask, bias))
    return _STRUCTS["attention"](*sizes, *_strides_of(q, k, v, out), *addresses, scale)


def _strides_of(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _heads_last(like: Tensor) -> Tensor:
    """An empty tensor (batch, heads, time, width) that lies in memory as (batch, time, heads, width)."""
    batch, heads, time, width = like.shape
    return torch.empty(batch, time, heads, width, dtype=like.dtype).transpose(1, 2)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else _addresses(tensor)[0]


def _openmp() -> tuple[int, int, int] | None:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in torch's own OpenMP."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    lines = (line.split(maxsplit=5) for line in maps.splitlines())
    loaded = {Path(line[5]) for line in lines if len(line) > 5}
    found = [path for path in loaded if path.name.startswith(("libgomp", "libiomp5", "libomp"))]
    if len(found) > 1:  # other packages bring one too; torch's own lies in torch/lib or torch.libs
        near = Path(torch.__file__).parent
        found = [path for path in found if path.is_relative_to(near) or path.parent.name == "torch.libs"]
    if len(found) != 1:  # whose threads are torch's cannot be told
        return None
    library = ctypes.CDLL(str(found[0]))
    try:
        functions = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
    except AttributeError:
        return None
    first, second, third = (ctypes.cast(function, c_void_p).value or 0 for function in functions)
    return first, second, third


def load(at_most: str = "amx") -> Kernels | None:
    """The kernels with the best instruction set of this machine up to `at_most`, or None.

    The set is the process's: an earlier result uses it from then on, too.
    """
    path, openmp = compiled_module(_MODULE), _openmp()
    if left_out() or path is None or openmp is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.lexmill_begin.argtypes = [c_void_p, c_void_p, c_void_p, ctypes.c_int]
        number = library.lexmill_begin(*openmp, INSTRUCTION_SETS.index(at_most))
        return Kernels(library, INSTRUCTION_SETS[number])
    except (OSError, AttributeError):  # built for another machine, or an older one left behind
        return None


def why_none() -> str:
    """Why `KERNELS` is None, and what to do."""
    if left_out():
        return "LEXMILL_NATIVE is 0."
    if compiled_module(_MODULE) is None:
        return "they were not built. Install a C++ compiler, then lexmill again."
    if _openmp() is None:
        return "torch's OpenMP was not found in this process."
    return "what was built is for another machine or version. Install lexmill again."


KERNELS = load()


def kernels_for(tensor: Tensor) -> Kernels | None:
    """The kernels where there are some and they take a tensor like this: on a CPU, in float32 or bfloat16."""
    return KERNELS if tensor.device.type == "cpu" and tensor.dtype in DTYPES else None


def learns_on_cpu(*tensors: Tensor) -> bool:
    """Whether a gradient is wanted of one of these, and they lie on a CPU."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return wanted and tensors[0].device.type == "cpu"
