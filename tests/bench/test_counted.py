"""bench/counted.py: its table is what the sizes say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.exhaustive
def test_the_table():
    """In a process of its own, since Triton is loaded with its interpreter. A minute."""
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, str(ROOT / "bench" / "counted.py"), "--copy", "1", "--gemm", "0.001"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    rows = {
        cells[1].strip(" `"): [cell.strip() for cell in cells[2:6]]
        for line in out.splitlines()[2:]
        if (cells := line.split("|"))
    }
    assert rows["shrink"][2] == f"{(8192 * 4096 + 16 * 4096 + 8192 * 16) * 2 / 1e6:,.1f}"
    assert float(rows["shrink"][3].replace(",", "")) == pytest.approx(2 * 8192 * 4096 * 16 / 1e3, rel=0.01)  # by FLOPs
    outputs = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)  # rows of B in Llama-3-8B
    assert rows["scaled_merge_"][2] == f"{3 * outputs * 16 * 4 / 1e6:,.1f}"
    assert float(rows["scaled_merge_"][3].replace(",", "")) == pytest.approx(3 * outputs * 16 * 4 / 1e6, rel=0.01)
    # What docs/testing.md shows of it.
    shown = (ROOT / "docs" / "testing.md").read_text("utf-8")
    assert all(
        f"| `{name}` | {count} | {kernels} | {size} |" in shown for name, (count, kernels, size, _) in rows.items()
    )
    assert [rows[name][0] for name in ("scaled_merge_", "fold_", "orthogonal_init_")] == ["1", "1", "7"]
