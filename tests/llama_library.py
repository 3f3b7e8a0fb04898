"""llama.cpp and ggml as a C library, reached through the xllamacpp wheel: for what its server cannot be asked.

Parameter structs are passed by value. Their size is not ours to know, so there is room for any of them, and
only their first fields are touched.
"""

from __future__ import annotations

import ctypes
from pathlib import Path


class Params(ctypes.Structure):
    """Any of llama.cpp's parameter structs."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    """`llama_batch`: ids, and for each whether its logits are wanted."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        *((name, ctypes.c_void_p) for name in ("embd", "pos", "n_seq_id", "seq_id")),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_POINTER = ctypes.c_void_p
_FUNCTIONS = {
    "llama_model_default_params": (Params, []),
    "llama_context_default_params": (Params, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, Params]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [_POINTER]),
    "llama_model_decoder_start_token": (ctypes.c_int32, [_POINTER]),
    "llama_init_from_model": (_POINTER, [_POINTER, Params]),
    "llama_batch_get_one": (Batch, [ctypes.POINTER(ctypes.c_int32), ctypes.c_int32]),
    "llama_encode": (ctypes.c_int32, [_POINTER, Batch]),
    "llama_decode": (ctypes.c_int32, [_POINTER, Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_POINTER]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [_POINTER, ctypes.c_int32]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, ctypes.c_bool]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, _POINTER, _POINTER, *[ctypes.c_int64] * 3, _POINTER],
    ),
}


def library() -> ctypes.CDLL:
    """The library, with the types of the functions that are used here."""
    import xllamacpp

    found = ctypes.CDLL(str(sorted(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))[0]))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def load(lib: ctypes.CDLL, path: str, room: int) -> tuple[int, int, int]:
    """Load a file: the model, a context of `room` tokens, and how many tokens there are to choose from."""
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    assert model, "the file does not load"
    params = lib.llama_context_default_params()
    params.words[0] = params.words[1] = params.words[2] = room  # n_ctx, n_batch, n_ubatch
    context = lib.llama_init_from_model(model, params)
    return model, context, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
