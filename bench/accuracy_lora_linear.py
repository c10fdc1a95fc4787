"""Prints, as Markdown, how far PEFT's lora.Linear and ours are from fp64: `python bench/accuracy_lora_linear.py`.

The grid and the cases are the accuracy test's (tests/slao_kernels/ops/test_lora_linear_accuracy.py). PEFT's rows are
RMS(error) / RMS(exact), a mean over all shapes and ranks; ours are multiples of PEFT's. Options: backends, then --gpu.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from pathlib import Path

import torch

from slao_kernels import dispatch

RESULTS = ("y", "dx", "dA", "dB")
DELTAS = {"1 %": 0.01, "1/3": 1 / 3, "10": 10.0}


def _accuracy_test():
    path = Path(__file__).resolve().parents[1] / "tests/slao_kernels/ops/test_lora_linear_accuracy.py"
    sys.path += [str(path.parent), str(path.parents[1])]  # what the test imports
    spec = importlib.util.spec_from_file_location("slao_kernels_tests_accuracy", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    test = _accuracy_test()
    device = "cuda" if "--gpu" in sys.argv else "cpu"
    backends = [name for name in sys.argv[1:] if name != "--gpu"]
    if not backends:
        known = ("reference", "eager", "native", "triton")
        backends = [name for name in known if dispatch.why_not("lora_linear", name, device) is None]
    interpreted = device == "cpu" and "triton" in backends
    shapes, ranks = (test.FEW_SHAPES, test.FEW_RANKS) if interpreted else (test.SHAPES, test.RANKS)
    print(f"torch {torch.__version__}, {device}; (M, K, N) of {', '.join(map(str, shapes))}; r of {ranks}\n")
    print("| precision: adapters on base | delta / base | who | " + " | ".join(RESULTS) + " |")
    print("|---|---|---|" + "---|" * len(RESULTS))
    for setting in (*test.WIDE, *test.SAME_DTYPE, *test.NARROWED):
        for label, delta in DELTAS.items():
            for backend in backends:
                cells = []
                for (m, k, n), seeds in shapes.items():
                    for r in ranks:
                        case = test.against_peft.Case(
                            m, k, n, r, setting.base, setting.adapter, delta, setting.autocast
                        )
                        cells.append(test.against_peft.measure(case, seeds, backend, setting.precision, device))
                errors = test.against_peft.pooled(cells)
                if backend == backends[0]:
                    theirs = " | ".join(f"{math.sqrt(errors[name].peft):.2e}" for name in RESULTS)
                    print(f"| {setting} | {label} | PEFT | {theirs} |")
                mine = " | ".join(f"{errors[name].ratio:.3f}" for name in RESULTS)
                print(f"| | | {backend} | {mine} |", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # PEFT's, about layers on the meta device
    torch.set_num_threads(1)
    main()
