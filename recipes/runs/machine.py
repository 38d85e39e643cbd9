"""The machine and its processes: what runs where, in which arithmetic, and from which seed."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import sys
from pathlib import Path
from typing import Any

from recipes.config import ConfigError


def describe_machine(cpuinfo: str | Path = "/proc/cpuinfo") -> dict[str, Any]:
    """CPU, cores and threads in use, memory (GiB) and GPU, as far as they can be read without loading anything."""
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    with contextlib.suppress(OSError):
        lines = Path(cpuinfo).read_text("utf-8", errors="replace").splitlines()
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
        facts["cpu"] = named[0] if named else facts["cpu"]
    with contextlib.suppress(AttributeError, OSError):  # fewer where the process may not use them all
        facts["cores"] = len(os.sched_getaffinity(0))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if (torch := sys.modules.get("torch")) is not None:
        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return facts


def machine_text(record: dict[str, Any]) -> str:
    """One line for people, from a run.json; of an older one that knows the number of CPUs alone, that."""
    machine = record.get("machine") or {}
    if not machine:
        return f"{record.get('cpus', '?')} CPU cores"
    parts = [machine["gpu"]] if machine.get("gpu") else []
    parts += [str(machine.get("cpu", "?")), f"{machine.get('cores', '?')} cores"]
    parts += [f"{machine['threads']} torch threads"] if machine.get("threads") else []
    return ", ".join(parts)


def is_main_process() -> bool:
    """True in the process that writes (torchrun sets RANK)."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """How many processes were started for this run (torchrun sets WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_device(device: str = "auto") -> str:
    """``auto`` -> ``cuda`` where there is one, else ``cpu``; anything else is checked and returned.

    Raises:
        ConfigError: torch sees no GPU, or does not know such a device.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch {torch.__version__} sees no GPU; use device=cpu or device=auto")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not one that torch knows: use auto, cpu, cuda or cuda:N") from error
    return device


def training_device(device: str = "auto") -> str:
    """`resolve_device` for what transformers' Trainer trains: on a process's first visible GPU, whatever its number.

    Raises:
        ConfigError: no such device, or a GPU by number.
    """
    resolved = resolve_device(device)
    if resolved.startswith("cuda:") and resolved != "cuda:0":
        raise ConfigError(
            f"device {device!r}: a training takes the first GPU it sees; choose with CUDA_VISIBLE_DEVICES="
            f"{resolved.removeprefix('cuda:')} and device=cuda"
        )
    return resolved


def resolve_precision(precision: str = "auto", device: str = "auto") -> str:
    """``auto`` -> ``bf16`` only where the hardware multiplies it fast (AMX, avx512_bf16, a GPU), else ``fp32``.

    Raises:
        ConfigError: an unknown name, or fp16 on a CPU.
    """
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise ConfigError(f"precision {precision!r}: choose auto, fp32, bf16 or fp16")
    on_gpu = resolve_device(device).startswith("cuda")
    if precision == "fp16" and not on_gpu:
        raise ConfigError("precision fp16 needs a GPU; use bf16, fp32 or auto")
    if precision != "auto":
        return precision
    if on_gpu:
        import torch

        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    return "bf16" if cpu_has_fast_bf16() and _kernels_may_use_bf16() else "fp32"


def cpu_has_fast_bf16(cpuinfo: str | Path = "/proc/cpuinfo") -> bool:
    """Whether the CPU's flags name AMX or AVX-512 bf16 (elsewhere bf16 is emulated, slower than fp32)."""
    try:
        text = Path(cpuinfo).read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return "amx_bf16" in flags or "avx512_bf16" in flags


def _kernels_may_use_bf16() -> bool:
    """Whether oneDNN multiplies bf16 here; `ONEDNN_MAX_CPU_ISA` may keep it from units that the processor has."""
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (what libraries draw from)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
