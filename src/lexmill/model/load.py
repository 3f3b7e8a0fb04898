"""From a model directory to a model in memory, ready to run."""

from __future__ import annotations

from lexmill.model.adapter import Adapter
from lexmill.model.build import build_loaded
from lexmill.model.directory import ModelDirectory
from lexmill.model.lora import add_adapter
from lexmill.model.quantised import build_quantised
from lexmill.model.transformer import Transformer


def load_model(directory: ModelDirectory, adapter: Adapter | None = None, quantise: str = "") -> Transformer:
    """The model of a directory, in memory, ready to run.

    Args:
        adapter: to put into it.
        quantise: a type in which the matrices of its blocks are kept, as `lexmill.model.quantised` has
            them; float32 when not given.
    """
    if quantise:
        model, _ = build_quantised(directory.config, directory.weights_on_demand(), quantise)
    else:
        model = build_loaded(directory.config, directory.weights_on_demand())
    if adapter is not None:
        add_adapter(model, adapter)
    return model.eval()
