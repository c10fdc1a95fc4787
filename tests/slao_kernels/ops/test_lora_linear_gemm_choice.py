"""When the GEMM with the rank-r term is taken: only by a measurement near the product that says it wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import gemm, tiles

pytestmark = pytest.mark.usefixtures("fresh_tables")

TILE = {"block_m": 128, "block_n": 256, "block_k": 64, "warps": 8, "stages": 3, "tma": True}
ROW = {"layout": "kn", "dtype": "bfloat16", "m": 8192, "n": 4096, "k": 14336, "r": 16, "tile": TILE}
ROW |= {"ours_us": 100.0, "torch_us": 110.0, "noise_us": 2.0}


@pytest.fixture
def write(tmp_path: Path, monkeypatch):
    """Writes the rows given into the file of "GPU"."""
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)

    def write(*rows: dict) -> None:
        tiles.path_of("GPU").write_text(json.dumps({"about": "for the test", "gemm": rows}))

    return write


def chosen(**wish) -> gemm.Tile | None:
    """The tile for ROW's product, with the differences in `wish`."""
    asked = (
        {key: ROW[key] for key in ("layout", "m", "n", "k", "r")} | {"dtype": torch.bfloat16, "device": "GPU"} | wish
    )
    return gemm.chosen(**asked)


def test_no_device_has_a_table_and_none_is_an_error():
    assert [path.name for path in tiles.FOLDER.iterdir()] == ["default.json"]
    assert "Not measured" in json.loads((tiles.FOLDER / "default.json").read_text())["about"]
    for device in ("NVIDIA H200", "AMD Instinct MI300X", "A GPU of 2040", "", "interpreter"):
        assert gemm.measurements(device) == ()
        assert chosen(device=device) is None


@pytest.mark.parametrize(("torch_us", "wins"), [(110.0, True), (102.1, True), (102.0, False), (90.0, False)])
def test_a_win_is_more_than_the_noise(torch_us, wins, write):
    write({**ROW, "torch_us": torch_us})
    assert chosen() == (gemm.Tile(**TILE) if wins else None)


NEAR = [{"m": 6000}, {"m": 11000}]
FAR = [{"m": 5700}, {"m": 12000}, {"m": 1}, {"r": 24}, {"r": 8}, {"n": 4104}, {"k": 14328}, {"layout": "nk"}]
FAR += [{"r": 12}]  # as near, but read in another way
FAR += [{"dtype": torch.float16}, {"dtype": torch.float32}, {"device": "another GPU"}]


@pytest.mark.parametrize("wish", [*NEAR, *FAR], ids=str)
def test_near(wish, write):
    write(ROW)
    assert (chosen(**wish) is not None) is (wish in NEAR)


def test_the_nearest_row_decides(write):
    """A loss that is nearer than a win is a loss, whatever the order of the rows."""
    lost = {**ROW, "m": 7000, "torch_us": 50.0}
    for rows in ((ROW, lost), (lost, ROW)):
        write(*rows)
        for cached in (tiles.rows, gemm.chosen):
            cached.cache_clear()
        assert chosen(m=8000) is not None
        assert chosen(m=7100) is None


def test_what_is_remembered_is_bounded():
    """Every batch may have another number of tokens: the answers for the last 1024 of them are kept, and no more."""
    for m in range(1, 1500):
        tiles.find("shrink", torch.bfloat16, m, 4096, 16)
        chosen(m=m)
    for cached in (tiles.find, gemm.chosen):
        assert cached.cache_info().misses >= 1499
        assert cached.cache_info().currsize == cached.cache_info().maxsize == 1024


def test_forcing_ends_with_the_block():
    first, second = gemm.CANDIDATES[:2]
    with tiles.force("gemm", first):
        with pytest.raises(ZeroDivisionError), tiles.force("gemm", second):
            assert tiles.forced["gemm"] is second
            raise ZeroDivisionError
        assert tiles.forced["gemm"] is first
    assert "gemm" not in tiles.forced
