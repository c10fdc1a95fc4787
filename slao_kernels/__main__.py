"""python -m slao_kernels: versions, devices, and which backend each op takes here and why."""

from __future__ import annotations

import platform
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


def describe() -> str:
    """The whole table as text."""
    lines = [f"{name:<14}{version}" for name, version in versions().items()]
    for device, what in devices().items():
        lines += ["", f"{device}: {what}"]
        for op in dispatch.OPS:
            try:
                chosen = dispatch.choose(op, device)
            except ValueError as error:  # SLAO_KERNELS_BACKEND asks for what this op has not
                lines.append(f"  {op:<16} {error}")
                continue
            others = [
                f"{name}: {dispatch.why_not(op, name, device) or 'available'}"
                for name in dispatch.BACKENDS[1:]
                if name != chosen and not (name == "eager" and op != "lora_linear")
            ]
            lines.append(f"  {op:<16} {chosen:<10} ({'; '.join(others)})")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
