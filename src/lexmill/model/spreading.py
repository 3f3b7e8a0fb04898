"""Tensors that are spread over processes (torch's DTensor), and those that are not, handled alike."""

from __future__ import annotations

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over processes, gathered; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, the same in each process, spread as `parameter` is."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    same = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same.redistribute(placements=parameter.placements)
