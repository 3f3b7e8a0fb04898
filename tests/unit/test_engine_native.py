"""The compiled engine on its own: under sanitizers, and on the processors that this computer can only imitate."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "native" / "engine"
STEPS = [
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]
VNNI = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mfma",
    "-mf16c",
    "-mavx512vnni",
    "-mprefer-vector-width=512",
]
KINDS = {
    "x86_64": {
        "portable": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512_vnni": VNNI,
        "avx512_bf16": [*VNNI, "-mavx512bf16"],
        "amx": [*VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-DLEXMILL_AMX"],
    },
    "aarch64": {"portable": [], "neon": ["-march=armv8.2-a+dotprod"]},
}


def _build(folder, compiler, processor, flags):
    def run(*arguments):
        done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    common = [compiler, "-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", *STEPS, *flags]
    made = []
    for isa, extra in KINDS[processor].items():
        made.append(folder / f"{isa}.o")
        run(*common, f"-DLEXMILL_ISA={isa}", *extra, "-c", ENGINE / "kernels.cpp", "-o", made[-1])
    program = folder / "engine_test"
    amx = ["-DLEXMILL_ENGINE_AMX"] if processor == "x86_64" else []
    sources = [ROOT / "tests" / "native" / "engine_test.cpp", ENGINE / "engine.cpp", ENGINE / "pack.cpp"]
    run(*common, *amx, *sources, *made, "-o", program, "-pthread")
    return program


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_under_sanitizers(tmp_path, sanitizers):
    program = _build(
        tmp_path, "g++", "x86_64", ["-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    )
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("passed\n"), done.stdout + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_on_arm(tmp_path):
    """NEON's products of bytes, in an emulator: correct, of speed it says nothing."""
    program = _build(tmp_path, "aarch64-linux-gnu-g++", "aarch64", ["-O2", "-static"])
    done = subprocess.run(["qemu-aarch64", program], capture_output=True, text=True)
    assert done.returncode == 0 and "neon" in done.stdout, done.stdout + done.stderr[-4000:]
