"""The first call of torch's elementwise functions: made by one thread, before a model computes."""

import subprocess
import sys

PROCESS = """
import torch
from lexmill.model.build import build_model
from lexmill.model.config import ModelConfig
from lexmill.model.vector_math import _FUNCTIONS, settle_vector_math

torch.set_num_threads(2)
assert settle_vector_math.cache_info().misses == 0
called = []
for name in _FUNCTIONS:
    function = getattr(torch, name)
    setattr(torch, name, lambda x, name=name, function=function: (called.append((name, x.dtype, x.numel())), function(x))[1])
build_model(ModelConfig(vocab_size=8, width=8, layers=1, heads=1, kv_heads=1, head_width=8, mlp_width=8, context=8))
assert {(name, dtype) for name, dtype, _ in called} == {
    (name, dtype) for name in _FUNCTIONS for dtype in (torch.float32, torch.float64)
}
assert {count for _, _, count in called} == {1}  # too few for a second thread
angles = torch.arange(8192) * 0.01
assert torch.equal(angles.cos(), angles.cos())
"""


def test_a_model_is_built_after_each_function_was_called_once():
    subprocess.run([sys.executable, "-c", PROCESS], check=True, timeout=120)
