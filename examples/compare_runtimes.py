"""Export a model for llama.cpp, and ask transformers and llama.cpp whether they give the same answers.

python examples/compare_runtimes.py runs/quickstart --types f16 q8_0
"""

import argparse
import tempfile
from pathlib import Path

import lexmill
from lexmill.inference.language_model import find_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a model directory or a run directory")
parser.add_argument("--types", nargs="+", default=["f16", "q8_0"])
parser.add_argument("--tokens", type=int, default=32)
arguments = parser.parse_args()

model = find_model(arguments.model)
with tempfile.TemporaryDirectory() as folder:
    files = [lexmill.export_gguf(model, Path(folder) / f"{type}.gguf", type) for type in arguments.types]
    report = lexmill.verify(model, files, tokens=arguments.tokens)

for runtime, check, result, figure, detail in report.table_rows():
    print(f"{runtime:<16} {check:<14} {result:<12} {figure:<20} {detail}")
raise SystemExit(report.exit_code)  # 0: all the same
