"""Which tile a shape takes: nearest, device's own table first, and never an error for a device that is unknown."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from slao_kernels.ops.lora_linear import tiles

pytestmark = pytest.mark.usefixtures("fresh_tables")
KERNELS = ["shrink", "outer", "grad_t", "expand_dropped"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("r", [1, 15, 16, 17, 100, 256])
def test_defaults_serve_every_rank(kernel, dtype, r):
    for m in (1, 100, 10**6):
        tile = tiles.find(kernel, dtype, m, 4096, r, device="A GPU of 2040")
        if kernel == "grad_t" and dtype == torch.float32 and r > 32:
            assert tile is None  # two passes: its tiles of that size spill
            continue
        assert tile is not None
        assert tile.r >= r
        assert kernel != "grad_t" or tile.block_r >= r
        # What Triton's products and the generator's groups of eight ask for.
        assert min(tile.block_m, tile.block_k, tile.block_r) >= 16
        assert all(size & (size - 1) == 0 for size in (tile.block_m, tile.block_k, tile.block_r, tile.warps))


def test_small_batches_take_small_tiles():
    small, large = (tiles.find("shrink", torch.bfloat16, m, 4096, 16) for m in (2, 8192))
    assert (small.block_m, large.block_m) == (16, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes_have_tiles_of_their_own(dtype):
    for kernel in ("shrink", "outer", "expand_dropped"):
        tile = tiles.find(kernel, dtype, 4096, 4097, 200, aligned=False, device="A GPU of 2040")
        assert tile is not None
        assert tile.block_m * tile.block_k <= 2048
    assert tiles.find("grad_t", dtype, 4096, 4097, 8, aligned=False) is None  # two passes


def test_rank_beyond_the_table():
    assert tiles.find("shrink", torch.bfloat16, 10, 10, 257) is None
    assert tiles.find("shrink", torch.float64, 10, 10, 8) is None


ROW = {"kernel": "shrink", "bits": 16, "r": 16, "block_k": 64, "block_r": 16, "warps": 4, "stages": 3}


def test_a_devices_own_table_comes_first(tmp_path: Path, monkeypatch):
    rows = [{**ROW, "m": m, "k": k, "block_m": b} for m, k, b in ((64, 1024, 16), (64, 8192, 32), (8192, 8192, 256))]
    (tmp_path / "nvidia_h200_80gb.json").write_text(json.dumps({"about": "for the test", "tiles": rows}))
    (tmp_path / "default.json").write_text((tiles.FOLDER / "default.json").read_text())
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)

    def block_m(m: int, k: int, r: int = 16) -> int:
        found = tiles.find("shrink", torch.bfloat16, m, k, r, device="NVIDIA H200-80GB")
        assert found is not None
        return found.block_m

    assert [block_m(40, 900), block_m(40, 7000), block_m(5000, 7000)] == [16, 32, 256]
    assert block_m(5000, 7000, r=17) == 128  # not in its table: the default


GEMM = {"layout": "kn", "dtype": "bfloat16", "m": 8192, "n": 4096, "k": 14336, "r": 16, "ours_us": 1.0, "torch_us": 2.0}
GEMM |= {"noise_us": 0.1, "tile": {"block_m": 128, "block_n": 256, "block_k": 64, "warps": 8, "stages": 3, "tma": True}}
# The lists that a file may have -> (its row, what makes it none)
WRONG = {
    "tiles": (ROW | {"block_m": 64}, [("m", 0), ("block_m", "64"), ("block_m", 48), ("block_m", 8)]),
    "gemm": (
        GEMM,
        [
            *(("m", 0), ("m", "8192"), ("n", 4096.5), ("layout", "tn"), ("dtype", "float32"), ("ours_us", -1)),
            *(("ours_us", "fast"), ("torch_us", float("nan")), ("tile", None), ("note", "?")),
            *(("tile", GEMM["tile"] | wrong) for wrong in ({"block_n": 512}, {"block_k": 48}, {"colour": "red"})),
        ],
    ),
}
TEXTS = [
    "{",
    "[]",
    "5",
    '{"rows": []}',
    '{"NAME": [{"kernel": "shrink"}]}',
    '{"NAME": [7]}',
    '{"NAME": 7}',
    '{"NAME": {"a": 1}}',
]
BROKEN = [(name, text.replace("NAME", name)) for name in WRONG for text in TEXTS]
BROKEN += [(of, json.dumps({of: [row | {key: value}]})) for of, (row, wrong) in WRONG.items() for key, value in wrong]


@pytest.mark.parametrize(("of", "text"), BROKEN)
def test_a_broken_table_warns_once_and_is_left_out(of, text, tmp_path, monkeypatch):
    (tmp_path / "gpu.json").write_text(text)
    (tmp_path / "default.json").write_text((tiles.FOLDER / "default.json").read_text())
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)

    def served(m: int) -> bool:
        """By the defaults; by torch's own product."""
        if of == "gemm":
            gemm = pytest.importorskip("slao_kernels.ops.lora_linear.gemm", reason="triton is not installed")
            return gemm.chosen("kn", torch.bfloat16, m, 4096, 14336, 16, "GPU") is None
        return tiles.find("shrink", torch.bfloat16, m, 4096, 16, device="GPU").block_m == {8192: 64, 2: 16}[m]

    with pytest.warns(UserWarning, match=f"gpu.json has no table of {of} that can be read"):
        assert served(8192)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served(2)


def test_a_file_may_hold_one_list(tmp_path, monkeypatch):
    (tmp_path / "gpu.json").write_text('{"about": "for the test", "gemm": []}')
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.table("GPU") == ()
