"""The model and the machine of a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from swift_gguf.model import Model
from swift_gguf.native import library


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model, and how it runs."""

    name: str
    description: str
    n_bytes: int
    """Size of all tensors."""
    n_layer: int
    n_threads: int
    device: str
    llama_commit: str


def subject(model: Model) -> Subject:
    """Describes the model and the device."""
    native = library()
    devices = native.devices()
    gpus = [device for device in devices if device.is_gpu] if model.options.n_gpu_layers else []
    return Subject(
        name=model.path.name,
        description=model.description,
        n_bytes=model.n_bytes,
        n_layer=model.n_layer,
        n_threads=model.n_threads,
        device=", ".join(device.description for device in gpus or devices[:1]),
        llama_commit=native.llama_commit,
    )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a measurement."""

    cpu: str
    cores: int
    """Cores that this process may use."""
    system: str
    load: float
    """Load average of the last minute; 0 if unknown."""


def machine() -> Machine:
    """Describes this machine.  Call it before the measurement, which is a load itself."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return Machine(
        cpu=_cpu_name(),
        cores=cores,
        system=f"{platform.system()} {platform.machine()}",
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    )


def _cpu_name() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
