"""What this machine's integer instructions are: parity and speed depend on them, so certificates name them."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction-set flags that the kernel reports for the first processor (empty where it reports none)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


@functools.cache
def isa() -> str:
    """The integer dot-product level of this CPU: "avx512vnni", "avxvnni", "avx2", "arm" or "generic".

    Without VNNI, x86 engines multiply u8 by s8 with VPMADDUBSW, whose int16 pair sums saturate when a weight
    needs all 8 bits; `Recipe.reduce_range` (7-bit weights) keeps every engine exact there."""
    flags = cpu_flags()
    if "avx512_vnni" in flags:
        return "avx512vnni"
    if "avx_vnni" in flags:
        return "avxvnni"
    if "avx2" in flags:
        return "avx2"
    return "arm" if platform.machine() in ("aarch64", "arm64") else "generic"


@functools.cache
def processor() -> str:
    """The processor's name, where the kernel tells it; else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


@functools.cache
def onednn_leads() -> bool:
    """Whether oneDNN's float32 products are much faster here than those of F.linear (MKL), which takes 256-bit instructions on every AMD
    processor: twice as fast where the processor is wider, Zen 5 and later (family 26); within 10 % on Zen 4."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return found.get("vendor_id") == "AuthenticAMD" and int(found.get("cpu family", 0)) >= 26


def describe() -> dict[str, str | int]:
    """Machine facts for certificates and reports: ISA, architecture, processors available to this process."""
    return {"isa": isa(), "machine": platform.machine(), "cpus": len(os.sched_getaffinity(0))}
