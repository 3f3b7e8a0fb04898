"""What this machine offers, read without torch: cores, instruction sets, memory, torchrun's processes; a faster malloc."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that kernels choose by, in the words of /proc/cpuinfo.
_INTERESTING = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_bf16",
    "asimd",
)


@dataclass(frozen=True)
class Machine:
    """One computer: `cores` usable by this process, `features` of its CPU, `memory_bytes` in all."""

    system: str
    cpu: str
    cores: int
    features: tuple[str, ...]
    memory_bytes: int

    @property
    def cpu_class(self) -> str:
        """A short name to write beside a figure, such as "x86-64 AVX2"."""
        if "avx512_bf16" in self.features:
            return f"{platform.machine()} AVX-512 BF16"
        if "avx512f" in self.features:
            return f"{platform.machine()} AVX-512"
        if "avx2" in self.features:
            return f"{platform.machine()} AVX2"
        return platform.machine()


def this_machine() -> Machine:
    """Look at this machine."""
    text = ""
    if Path("/proc/cpuinfo").is_file():
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = 0
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        cores=usable_cores(),
        features=tuple(name for name in _INTERESTING if name in flags),
        memory_bytes=memory,
    )


def available_memory() -> int:
    """Bytes that this process may still take: what the system has free, or what is left of a container's limit.

    0 where that cannot be told.
    """
    free = 0
    if (path := Path("/proc/meminfo")).is_file():
        fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        free = int(fields.get("MemAvailable", "0").split()[0]) * 1024
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ):
        try:
            left = int(limit.read_text()) - int(used.read_text())
        except (OSError, ValueError):  # another version of control groups, or "max": no limit
            continue
        free = min(free, left) if free else left
    return max(free, 0)


def resident_memory() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """The most bytes that this process has held so far; 0 where the system does not tell.

    Linux counts what the parent held when this process began into `ru_maxrss`, so its own count comes first.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # proc(5): "peak resident set size", in KiB
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_freed_memory() -> None:
    """Let glibc return what is free to the system, where there is glibc; undoes `keep_freed_memory` for once."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def left_out() -> bool:
    """Whether compiled code is not wanted (environment variable LEXMILL_NATIVE=0)."""
    return os.environ.get("LEXMILL_NATIVE") == "0"


def compiled_module(name: str) -> Path | None:
    """Where a module of `native/` lies that was built with the package; None where it was not.

    Args:
        name: without its ending, e.g. "_engine".
    """
    import lexmill

    ending = {"linux": ".so", "darwin": ".dylib"}.get(sys.platform)
    # an editable install has two folders: the sources, and what was built
    paths = [Path(folder) / (name + ending) for folder in lexmill.__path__ if ending]
    return next((path for path in paths if path.is_file()), None)


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def threads() -> int:
    """How many threads to compute with: OMP_NUM_THREADS where it is set, else the usable cores."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else usable_cores()


def process_count() -> int:
    """How many processes run this command together: torchrun's WORLD_SIZE, else 1."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_rank() -> int:
    """Which of them this one is, from 0: torchrun's RANK."""
    return int(os.environ.get("RANK") or 0)


def wait_briefly() -> None:
    """Make waiting threads give up their core soon. Call before torch is imported.

    OpenMP's threads spin at each barrier until the last one arrives; where another process holds
    one of the cores, they burn the time that it needs (measured: docs/decisions.md).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks instead of giving each back to the system.

    A training step frees and asks again for the same megabytes many times; without this each
    time costs a page fault for every 4 KiB (measured: a cross-entropy step 2.4 times as fast). Where Linux
    has huge pages to give, the first gigabyte lies in them (measured: training steps 3 to 11 % faster).

    Returns:
        Whether the C library understood.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    kept = bool(mallopt(mmap_threshold, 1 << 30)) and bool(mallopt(trim_threshold, (1 << 31) - 1))
    if kept:
        _ask_for_huge_pages(libc, (1 << 30) - _HUGE_PAGE)
    return kept


_HUGE_PAGE = 1 << 21


def _ask_for_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Let the next `size` bytes of the heap be backed by huge pages; nothing is held until it is written to."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block:
        start = (block + _HUGE_PAGE - 1) // _HUGE_PAGE * _HUGE_PAGE
        libc.madvise(start, (block + size - start) // _HUGE_PAGE * _HUGE_PAGE, 14)  # MADV_HUGEPAGE
        libc.free(block)  # it stays at the end of the heap, as `keep_freed_memory` wants
