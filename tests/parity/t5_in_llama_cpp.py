"""Run a T5 file in llama.cpp through its C interface: its server cannot load one, the library can.

    python t5_in_llama_cpp.py FILE '[[source ids], [written ids]]'

prints the logits behind each written id as JSON.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llama_library import library, load


def main():
    lib, (source, written) = library(), json.loads(sys.argv[2])
    model, context, size = load(lib, sys.argv[1], 128)

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
