"""Do all runtimes give the same answers on these models? One Markdown table a model, a row a type of GGUF file.

python bench/verify_models.py MODEL... [--types f32,q8_0] [--keep FOLDER]

Each file is written, verified and removed. With --keep the reports stay, and what has one is not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lexmill.errors import LexmillError
from lexmill.inference.language_model import find_model
from lexmill.model.directory import ModelDirectory
from lexmill.runtimes.llama_cpp import FILE_TYPES, export_gguf
from lexmill.runtimes.verify import verify

_IDS = ("tokens", "injection", "round trip", "chat template", "stop tokens", "pairs", "fill", "beams", "runs")
_HEAD = "| runtime | texts and ids | rounding the weights, nats | llama.cpp from lexmill | from lexmill with rounded activations | greedy | exit code |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--types", default=",".join(FILE_TYPES))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="a folder for the reports")
    arguments = parser.parse_args()
    for path in arguments.models:
        model = ModelDirectory.open(find_model(path))
        name = path.resolve().name if path.resolve().name != "model" else path.resolve().parent.name
        folder = arguments.keep or Path(tempfile.mkdtemp())
        folder.mkdir(parents=True, exist_ok=True)
        kept = {
            type: folder / f"{name}-{type}.json" for type in ["transformers", *arguments.types.split(",")]
        }
        _run(model, {type: path for type, path in kept.items() if not path.exists()}, arguments.tokens)
        rows = [_row(json.loads(path.read_text())) for path in kept.values()]
        print(f"\n**{name}** ({model.config.parameters / 1e6:.1f} million weights)\n")
        print("\n".join([_HEAD, "|" + "---|" * 7, *rows]), flush=True)


def _run(model: ModelDirectory, missing: dict[str, Path], tokens: int) -> None:
    """The reports of all that have none, by one call."""
    if not missing:
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files: list[Path] = []
        reports: dict[str, dict[str, Any]] = {type: {"runtime": _told(type)} for type in missing}
        for type in [type for type in missing if type != "transformers"]:
            try:
                files.append(export_gguf(model, Path(folder) / f"{type}.gguf", type))
            except LexmillError as error:  # llama.cpp has no form for it
                reports[type]["refused"] = str(error)
        found = verify(model.path, files, tokens=tokens, transformers="transformers" in missing).to_json()
    for type, report in reports.items():
        report["checks"] = [check for check in found["checks"] if check["runtime"] == _told(type)]
        report["exit_code"] = _exit_code(report["checks"])
        missing[type].write_text(json.dumps(report, indent=1))
    print(f"{', '.join(missing)}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def _told(type: str) -> str:
    """What `verify` calls a runtime."""
    return type if type == "transformers" else f"llama.cpp {type}"


def _exit_code(checks: list[dict[str, Any]]) -> int:
    passed = [check["passed"] for check in checks]
    return 1 if False in passed else 2 if None in passed else 0


def _row(report: dict[str, Any]) -> str:
    checks = {check["check"]: check for check in report["checks"]}
    ids = [check for name, check in checks.items() if name in _IDS]
    wrong = [check["check"] for check in ids if check["passed"] is False]
    limited = [check["check"] for check in ids if check["limits"]]
    said = (
        f"DIFFERENT: {', '.join(wrong)}" if wrong else f"limit: {', '.join(limited)}" if limited else "equal"
    )
    if all(check["passed"] is None for check in ids):
        said = "refused" if report.get("refused") else "only the weights were checked"
    cost = re.search(r"mean KL ([^ ]+) nats", checks.get("weights", {}).get("detail", ""))
    cells = [
        report["runtime"],
        said,
        cost.group(1) if cost else "",
        _figure(checks.get("logits") or checks.get("embeddings")),
        _figure(checks.get("rounding")),
        _greedy(checks.get("greedy")),
        str(report.get("exit_code", "")),
    ]
    return f"| {' | '.join(cells)} |"


def _figure(check: dict[str, Any] | None) -> str:
    if check is None or check["figure"] is None:
        return ""
    sign = "≤" if check["passed"] else ">"
    return f"{check['figure']:.2g} {sign} {check['tolerance']:.2g}"


def _greedy(check: dict[str, Any] | None) -> str:
    if check is None or check["figure"] is None:
        return ""
    same = re.match(r"(\d+ of \d+)", check["detail"])
    gap = re.search(r"is at most ([^ ]+) \(allowed ([^)]+)\)", check["detail"])
    ties = f", {check['ties']} ties, gaps to {gap.group(1)} ≤ {gap.group(2)}" if gap else ""
    return f"{same.group(1) if same else ''}{ties}{'' if check['passed'] else ', DIFFERENT'}"


if __name__ == "__main__":
    main()
