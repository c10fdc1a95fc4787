"""python -m slao_kernels: versions, devices, and which backend each op takes here and why."""

from __future__ import annotations

from .environment import describe

if __name__ == "__main__":
    print(describe())
