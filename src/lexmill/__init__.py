"""lexmill: from raw data to a running language model, in one package.

    import lexmill

    model = lexmill.load("runs/quickstart/model")
    model.generate("It is a truth", max_tokens=40)

The stages are plain functions with the names of the command line's verbs; each is imported when
it is first used, so that `import lexmill` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load": "lexmill.inference.language_model",
    "prepare": "lexmill.data.prepare",
    "train_tokenizer": "lexmill.tokenizer.training",
    "pretrain": "lexmill.pretrain.stage",
    "finetune": "lexmill.finetune.stage",
    "evaluate": "lexmill.evaluate.stage",
    "verify": "lexmill.runtimes.verify",
    "import_model": "lexmill.runtimes.import_model",
    "import_adapter": "lexmill.runtimes.gguf_adapter",
    "merge_adapter": "lexmill.runtimes.merge",
    "export_huggingface": "lexmill.runtimes.huggingface",
    "export_gguf": "lexmill.runtimes.llama_cpp",
    "export_adapter_gguf": "lexmill.runtimes.gguf_adapter",
    "collect_importance": "lexmill.evaluate.importance",
    "push": "lexmill.runtimes.hub",
    "run": "lexmill.recipe.run",
    "LexmillError": "lexmill.errors",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from lexmill.data.prepare import prepare
    from lexmill.errors import LexmillError
    from lexmill.evaluate.importance import collect_importance
    from lexmill.evaluate.stage import evaluate
    from lexmill.finetune.stage import finetune
    from lexmill.inference.language_model import load
    from lexmill.pretrain.stage import pretrain
    from lexmill.recipe.run import run
    from lexmill.runtimes.gguf_adapter import export_adapter_gguf, import_adapter
    from lexmill.runtimes.hub import push
    from lexmill.runtimes.huggingface import export_huggingface
    from lexmill.runtimes.import_model import import_model
    from lexmill.runtimes.llama_cpp import export_gguf
    from lexmill.runtimes.merge import merge_adapter
    from lexmill.runtimes.verify import verify
    from lexmill.tokenizer.training import train_tokenizer


class _Callable(type(importlib)):  # type: ignore[misc]
    """Keeps `lexmill.pretrain` the function after the folder `lexmill/pretrain` was imported too.

    Importing a submodule sets it as an attribute of its package; names that are both a verb and a
    room stay the verb.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _WHERE and isinstance(value, type(importlib)):
            return
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lexmill' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


import sys as _sys  # noqa: E402

_sys.modules[__name__].__class__ = _Callable
