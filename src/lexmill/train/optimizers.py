"""Optimisers: Muon for matrices between hidden states, AdamW for the rest, or AdamW for all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lexmill.model.beginning import JUDGES, rate_factor
from lexmill.model.spreading import placed_like, whole
from lexmill.train.config import TrainConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, "Muon"


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made orthogonal (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

    An update's singular values all become about 1, so that rare directions learn as fast as
    frequent ones. Matrices of equal shape are done together.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,  # of the products that make an update orthogonal
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack(
                    [whole(self._momentum(parameter, group["momentum"])) for parameter in parameters]
                )
                updates = orthogonalise(updates.to(self.dtype)).float()
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(placed_like(update, parameter), alpha=-scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)  # Nesterov


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix of each, roughly: U Vᵀ of its singular value decomposition.

    Args:
        matrices: (count, rows, columns).
        steps: of the quintic Newton–Schulz iteration.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def is_hidden(name: str, dimensions: int) -> bool:
    """Whether a parameter maps hidden states to hidden states: not a vocabulary, not a judge of whole texts."""
    others = ("embed.weight", "relative.weight", "head.weight", "span.weight")
    return dimensions == 2 and not name.endswith(others) and not name.startswith(JUDGES)


class OptimizerSet:
    """The optimisers of a run behind one face: step, learning rate, complete state as named arrays."""

    def __init__(
        self,
        model: Any,  # one of the shapes: its configuration tells which weights learn more slowly
        *,
        kind: str,
        learning_rate: float,
        matrix_learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
        precision: str = "float32",  # bfloat16 makes Muon's products run in it
    ) -> None:
        self._names: dict[Any, str] = {
            parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        muon: dict[float, list[nn.Parameter]] = {}
        adamw: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for parameter, name in self._names.items():
            factor = rate_factor(name, model.config)
            if kind == "muon" and is_hidden(name, parameter.dim()):
                muon.setdefault(factor, []).append(parameter)
            else:
                adamw.setdefault((factor, parameter.dim() >= 2), []).append(parameter)
        groups = [
            {"params": params, "lr": learning_rate * factor, "weight_decay": weight_decay if matrix else 0.0}
            for (factor, matrix), params in adamw.items()
        ]
        self.optimizers: list[torch.optim.Optimizer] = []
        if groups:  # of an adapter Muon may move everything
            self.optimizers.append(
                torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=True)
            )
        if muon:
            hidden = [
                {"params": params, "lr": matrix_learning_rate * factor} for factor, params in muon.items()
            ]
            self.optimizers.append(
                Muon(hidden, lr=matrix_learning_rate, weight_decay=weight_decay, dtype=_DTYPES[precision])
            )
        self._base = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    @classmethod
    def of_run(cls, model: Any, config: TrainConfig, precision: str) -> OptimizerSet:
        """Those that a run with these settings has."""
        return cls(
            model,
            kind=config.optimizer,
            learning_rate=config.learning_rate,
            matrix_learning_rate=config.matrix_learning_rate,
            weight_decay=config.weight_decay,
            precision=precision,
        )

    def set_precision(self, precision: str) -> None:
        """Make Muon's products run in "float32" or "bfloat16"."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.dtype = _DTYPES[precision]

    def step(self, factor: float) -> None:
        """One update with every learning rate times `factor`; gradients are cleared."""
        for optimizer, base in zip(self.optimizers, self._base):
            for group, rate in zip(optimizer.param_groups, base):
                group["lr"] = rate * factor
            optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """All state as tensors named "PARAMETER/KEY"; those of this process where it is spread over many."""
        return {
            f"{self._names[parameter]}/{key}": value
            for optimizer in self.optimizers
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        }

    def begin_state(self) -> None:
        """Fill the state as it is before the first step, for what is read to go into."""
        for optimizer in self.optimizers:
            kept = ("momentum",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq")
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = {key: torch.zeros_like(parameter, requires_grad=False) for key in kept}
                    if not isinstance(optimizer, Muon):
                        state["step"] = torch.zeros((), device=parameter.device)
                    optimizer.state[parameter] = state

    def state(self) -> dict[str, np.ndarray]:
        """All state as arrays named "PARAMETER/KEY"."""
        return {name: value.detach().cpu().numpy() for name, value in self.tensors().items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take up the state that `state` gave for the same model.

        What had none, because it never had a gradient, begins as it would have begun.
        """
        self.begin_state()
        tensors = self.tensors()
        for name, array in arrays.items():
            value = torch.from_numpy(np.array(array)).to(tensors[name].device)
            tensors[name].copy_(placed_like(value, tensors[name]))
