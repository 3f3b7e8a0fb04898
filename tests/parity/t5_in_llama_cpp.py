"""Run a T5 file in llama.cpp through its C interface: its server cannot load one, the library can.

    python t5_in_llama_cpp.py FILE '[[source ids], [written ids]]'

prints the logits behind each written id as JSON. The library is the one inside the xllamacpp wheel.
"""

import ctypes
import json
import os
import sys
from pathlib import Path


class Params(ctypes.Structure):
    """Room for any of llama.cpp's parameter structs; only their first fields are touched."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        *((name, ctypes.c_void_p) for name in ("embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


def library():
    import xllamacpp

    found = sorted(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    lib = ctypes.CDLL(str(found[0]))
    for name, result, arguments in (
        ("llama_model_default_params", Params, []),
        ("llama_context_default_params", Params, []),
        ("llama_model_load_from_file", ctypes.c_void_p, [ctypes.c_char_p, Params]),
        ("llama_model_get_vocab", ctypes.c_void_p, [ctypes.c_void_p]),
        ("llama_vocab_n_tokens", ctypes.c_int32, [ctypes.c_void_p]),
        ("llama_model_decoder_start_token", ctypes.c_int32, [ctypes.c_void_p]),
        ("llama_init_from_model", ctypes.c_void_p, [ctypes.c_void_p, Params]),
        ("llama_batch_get_one", Batch, [ctypes.POINTER(ctypes.c_int32), ctypes.c_int32]),
        ("llama_encode", ctypes.c_int32, [ctypes.c_void_p, Batch]),
        ("llama_decode", ctypes.c_int32, [ctypes.c_void_p, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def main():
    lib, (source, written) = library(), json.loads(sys.argv[2])
    model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
    assert model, "the file does not load"
    params = lib.llama_context_default_params()
    params.words[0], params.words[1], params.words[2] = 128, 128, 128  # n_ctx, n_batch, n_ubatch
    context = lib.llama_init_from_model(model, params)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def batch(ids):
        row = (ctypes.c_int32 * len(ids))(*ids)
        return row, lib.llama_batch_get_one(row, len(ids))

    row, one = batch(source)
    assert lib.llama_encode(context, one) == 0
    rows = []
    for token in written:
        row, one = batch([token])
        assert lib.llama_decode(context, one) == 0
        rows.append(lib.llama_get_logits_ith(context, -1)[:size])
        del row
    print(json.dumps({"start": lib.llama_model_decoder_start_token(model), "logits": rows}))
    sys.stdout.flush()
    os._exit(0)  # nothing here is worth an orderly end


main()
