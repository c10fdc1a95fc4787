"""The parts of `make gpu`, and what each runs: as a whole, quickly on a lent machine, and dry, where there is no GPU.

A dry run is tiny and on the CPU: it shows that every part starts, keeps to its time and writes its files.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Call:
    """One process. command: pytest's arguments, or Python's for what is no test ("script"), as in a shell. seconds: the
    most it may take."""

    kind: str  # "tests", "bench" or "script"
    command: str
    seconds: int
    device: str = "cuda"
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)


def of(*names: str) -> str:
    return " ".join(f"bench/bench_{name}.py" for name in names)


REST = ("orthogonal_init", "scaled_merge", "fold", "exact_fold", "transition", "interference", "weighted_merge")
# TABLE stands for the file that the tuner writes, beside the figures.
TABLE = "TABLE"
TUNER = f"bench/tune_lora_gemm.py --device-json {TABLE}"

# Limits are several times what is expected: they end what hangs.
WHOLE = {
    "tests": [Call("tests", "tests -m gpu", 1200)],
    "kernels": [Call("bench", of("lora_kernels"), 600)],
    "layers": [Call("bench", of("lora_linear"), 900), Call("bench", of("experts"), 300)],
    "steps": [Call("bench", of("training_step"), 1200), Call("bench", of("language_model"), 300)],
    "rest": [Call("bench", of(name), 300) for name in REST],
    "host": [Call("bench", of("host"), 300, "cpu")],
    "tune": [Call("script", f"{TUNER} --seconds 540", 600)],
}

# The headline figures: about six minutes on an H100 (counted, not measured), limits that together make eight.
KERNELS = "8192x4096-bf16-16 or 8192x4096-bf16-48 or reduce[bf16-16]"
LAYERS = "8192x4096x4096 and bf16 or 128x2048x768-grouped_mm-bf16"
BETWEEN = "init[16] or merge[fp32] or merge[bf16] or fold[bf16-bf16]"
# Graphs, streams, memory and whole models before the many cases of single operations, which may run out of time.
TOLD_FIRST = (
    "tests/slao_kernels/test_cuda.py tests/slao_kernels/test_training_gpu.py tests/slao_kernels/test_exact_merge.py "
    "tests/slao/methods/test_moved_and_failed.py tests/slao_kernels/ops"
)
ITS_OWN = "tests/slao_kernels/ops/test_tune_lora_gemm.py::test_on_a_gpu"  # the part `tune` does the same
QUICK = {
    "tests": [Call("tests", f"{TOLD_FIRST} -m 'gpu and not exhaustive' --timeout=60 --deselect {ITS_OWN}", 170)],
    "kernels": [Call("bench", f"{of('lora_kernels')} --timeout=30 -k '{KERNELS}'", 45)],
    "layers": [Call("bench", f"{of('lora_linear', 'experts')} --timeout=45 -k '{LAYERS}'", 75)],
    "steps": [Call("bench", f"{of('training_step')} --timeout=60 -k 1b-4x2048-bf16", 75)],
    "rest": [Call("bench", f"{of(*REST[:3])} --timeout=30 -k '{BETWEEN}'", 45)],
    "host": [Call("bench", f"{of('host')} --timeout=30 -k 'block and bf16 and autocast'", 45, "cpu")],
    "tune": [Call("script", f"{TUNER} --models llama-3.2-1b --tokens 8192 --ranks 16 --rounds 9 --seconds 50", 60)],
}

LIMIT = 150  # ends what hangs
SMALL = "--model=minilm --rounds=1 --threads=1 -p no:cacheprovider"
FORWARD, MIXTURE = "test_layer and 32x384x384-bf16-forward]", "4x64x32-grouped_mm-fp32"
DRY = {
    "tests": [Call("tests", "tests/slao_kernels/test_cuda.py -m gpu -p no:cacheprovider", LIMIT, "cpu")],
    "kernels": [Call("bench", f"{of('lora_kernels')} {SMALL} -k shrink-1024x384-bf16-16", LIMIT, "cpu")],
    "layers": [
        Call("bench", f"{of('lora_linear', 'experts')} {SMALL} -k '{FORWARD} or {MIXTURE}'", LIMIT, "cpu"),
    ],
    "steps": [Call("bench", f"{of('training_step')} {SMALL} -k minilm-2x16-fp32", LIMIT, "cpu")],
    "rest": [
        Call("bench", f"{of(*REST[:3])} {SMALL} -k 'init[16] or merge[fp32] or fold[bf16-bf16]'", LIMIT, "cpu"),
    ],
    "host": [Call("bench", f"{of('host')} {SMALL} -k 'forward-fp32-layer'", LIMIT, "cpu")],
    "tune": [
        Call(
            "script",
            f"{TUNER} --models minilm --tokens 32 --ranks 8 --rounds 1 --seconds 5",
            LIMIT,
            "cpu",
            {"TRITON_INTERPRET": "1"},
        )
    ],
}

# What a part cannot do without, beside torch; hypothesis is what some of the tests are written with.
NEEDED = dict.fromkeys(WHOLE, ("pytest", "pytest_benchmark", "peft", "transformers", "triton"))
NEEDED |= {"tests": ("pytest", "peft", "transformers", "triton", "hypothesis"), "tune": ("triton",)}
# Where NVIDIA's GPUs are: parts that run the CUDA kernels of the compiled core.
OF_THE_CORE = ("tests", "rest")
# Not in a run that names no part: the tuner's table is for this machine, and the host's time needs no GPU.
ON_REQUEST = ("host", "tune")


def workers() -> list[str]:
    """pytest's option for tests in several processes, which spend their time in compilers. Never for a bench."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(12, os.cpu_count() or 1))]
