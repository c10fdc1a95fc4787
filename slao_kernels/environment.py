"""What this machine has: versions, devices, and which backend each op takes on them and why."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch

import slao_kernels

from . import dispatch

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """Name -> version of what results depend on; "not installed" where it is absent."""
    found = {"slao_kernels": slao_kernels.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> dict[str, str]:
    """Device type -> what it is; the types that this process could run on."""
    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_device_name()
    return found


@dataclass(frozen=True)
class Choice:
    """The backend that an op takes on a device, None where it can take none (SLAO_KERNELS_BACKEND asks for what it has
    not), with the reason in `problem`. others: each other backend -> why not, or "available"."""

    op: str
    backend: str | None
    others: dict[str, str]
    problem: str | None = None

    def reasons(self) -> str:
        """`problem`, or the others in one line."""
        return self.problem or "; ".join(f"{name}: {why}" for name, why in self.others.items())


def choices(device: str) -> list[Choice]:
    """One for every op, on a device type."""
    found = []
    for op in dispatch.OPS:
        chosen = problem = None
        try:
            chosen = dispatch.choose(op, device)
        except ValueError as error:
            problem = str(error)
        others = {
            name: dispatch.why_not(op, name, device) or "available"
            for name in dispatch.BACKENDS[1:]
            if name != chosen and not (name == "eager" and op != "lora_linear")
        }
        found.append(Choice(op, chosen, others, problem))
    return found


def describe() -> str:
    """All of it as text."""
    lines = [f"{name:<14}{version}" for name, version in versions().items()]
    for device, what in devices().items():
        lines += ["", f"{device}: {what}"]
        for choice in choices(device):
            taken = f"{choice.backend:<10} ({choice.reasons()})" if choice.backend else choice.reasons()
            lines.append(f"  {choice.op:<16} {taken}")
    return "\n".join(lines)
