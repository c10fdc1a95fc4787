"""Triton's kernels where there is no GPU: the files that test them, run in processes in which Triton interprets them on
CPU tensors. The variable that says so is read when triton is imported, and torch.compile imports it too.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

HERE = Path(__file__).parent
# Processes of about the same length: file -> how many tests pass at least, those that are not exhaustive (see
# ops/conftest.py) and those that are.
TOGETHER = [
    {"ops/test_orthogonal_init.py": (20, 10), "ops/test_repeated.py": (10, 4), "ops/test_tables.py": (6, 3)},
    {"ops/test_fold.py": (20, 20), "ops/test_lora_linear_accuracy.py": (4, 10), "ops/test_tune_lora_gemm.py": (10, 3)},
    {
        "ops/test_every_op.py": (5, 12),
        "ops/test_lora_linear_products.py": (90, 60),
        "ops/test_orthogonal_init_keep.py": (8, 4),
        "ops/test_scaled_merge.py": (45, 35),
    },
    {
        "ops/test_every_node.py": (50, 30),
        "ops/test_lora_linear_dropout.py": (17, 7),
        "ops/test_lora_linear_gemm.py": (45, 50),
        "test_training_gpu.py": (15, 3),
    },
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of Triton's kernels run on the GPU here")
@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("files", TOGETHER, ids=["init", "fold", "products", "layers"])
def test_interpreted(files, which, tmp_path):
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-m", ("not exhaustive", "exhaustive")[which], *files]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=590, cwd=HERE)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    cases = ElementTree.parse(report).getroot().iter("testcase")
    passed = Counter(case.get("classname", "").rpartition(".")[2] for case in cases if case.find("skipped") is None)
    assert {file: passed[Path(file).stem] for file in files if passed[Path(file).stem] < files[file][which]} == {}
