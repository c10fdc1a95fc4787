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
# Processes of about the same length: file -> how many tests pass at least. Those that are not exhaustive (see
# ops/conftest.py); the others take many minutes: `TRITON_INTERPRET=1 pytest tests/slao_kernels/ops -m exhaustive`.
TOGETHER = {
    "init": {"ops/test_orthogonal_init.py": 19, "ops/test_repeated.py": 13, "ops/test_tables.py": 6},
    "fold": {"ops/test_fold.py": 15, "ops/test_lora_linear_accuracy.py": 2, "ops/test_tune_lora_gemm.py": 14},
    "exact fold": {
        "ops/test_exact_fold.py": 14,
        "ops/test_exact_fold_keep.py": 8,
        "ops/test_exact_fold_triton.py": 10,
    },
    "products": {
        "ops/test_every_op.py": 7,
        "ops/test_lora_linear_products.py": 52,
        "ops/test_orthogonal_init_keep.py": 8,
        "ops/test_scaled_merge.py": 28,
    },
    "layers": {
        "ops/test_every_node.py": 32,
        "ops/test_lora_linear_dropout.py": 9,
        "ops/test_lora_linear_gemm.py": 31,
        "test_training_gpu.py": 15,
    },
    "experts": {"ops/test_expert_linear_triton.py": 23},
}


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of Triton's kernels run on the GPU here")
@pytest.mark.parametrize("group", TOGETHER)
def test_interpreted(group, tmp_path):
    files, report = TOGETHER[group], tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-m", "not exhaustive", *files]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=590, cwd=HERE)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    cases = ElementTree.parse(report).getroot().iter("testcase")
    passed = Counter(case.get("classname", "").rpartition(".")[2] for case in cases if case.find("skipped") is None)
    assert {file: passed[Path(file).stem] for file in files if passed[Path(file).stem] < files[file]} == {}
