"""The tuner, all but its clock, without a GPU: what it measures and tries, and that lora_linear finds its tables."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_triton import DEVICE, INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import gemm, tiles

BENCH = Path(__file__).resolve().parents[3] / "bench"
sys.path.insert(0, str(BENCH))
import shapes  # noqa: E402
import tune_lora_gemm as tuner  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_tables")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Tables are looked for here."""
    (tmp_path / "default.json").write_text((tiles.FOLDER / "default.json").read_text())
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    return tmp_path


def test_products_are_forward_and_dx_of_every_layer():
    found = tuner.products(["llama-3-8b"], [2048, 8192], [8])
    assert len(found) == len(set(found)) == 2 * 2 * 4
    assert ("nk", 2048, 14336, 4096, 8) in found  # gate_proj forward: N = 14336
    assert ("kn", 2048, 4096, 14336, 8) in found  # and its dx, a sum over 14336
    every = tuner.products(tuner.GEOMETRIES, tuner.TOKENS, tuner.RANKS)
    assert len(every) == len(set(every)) == 2 * 16 * 9


def test_skinny_products_read_x_or_dy():
    found = tuner.skinny_products(["llama-3-8b"], [2048], [8, 64])
    widths = {kernel: {of.k for of in found if of.kernel == kernel} for kernel in ("shrink", "outer", "grad_t")}
    assert widths == {"shrink": {4096, 14336}, "outer": {4096, 14336}, "grad_t": {1024, 4096, 14336}}
    assert len(found) == len(set(found)) == 7 * 3
    assert {of.r for of in found} == {16, 32, 64}
    assert {of.r for of in tuner.skinny_products(["minilm"], [2048], [16])} == {16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiles_to_try(dtype):
    for of in tuner.skinny_products(tuner.GEOMETRIES, tuner.TOKENS, tuner.RANKS):
        tried = tuner.skinny_tiles(of, dtype)
        assert len(tried) == len(set(tried)) >= 8
        default = tiles.find(of.kernel, dtype, of.m, of.k, of.r)
        assert dataclasses.replace(tried[0], m=default.m, k=default.k) == default
        assert {(tile.kernel, tile.bits, tile.r, tile.m, tile.k) for tile in tried} == {
            (of.kernel, 16, of.r, of.m, of.k)
        }
        assert all(tile.block_r >= of.r for tile in tried)


@pytest.mark.parametrize("r", [16, 32, 64])
def test_enough_tiles_pass_once_over_dy(r):
    """With at most 64 blocks of rows: more leave more parts of dB than dy itself has bytes."""
    of = tuner.Skinny("grad_t", 8192, 4096, r)
    assert sum(of.m // tile.block_m <= 64 for tile in tuner.skinny_tiles(of, torch.bfloat16)) >= 8


def test_what_is_written_is_what_is_found(folder):
    skinny = [
        tuner.skinny_tiles(of, torch.bfloat16)[i % 8]
        for i, of in enumerate(tuner.skinny_products(["qwen3-4b", "minilm"], tuner.TOKENS, tuner.RANKS))
    ]
    measured = [
        gemm.Measurement(*of[:1], "bfloat16", *of[1:], 100.0, 90.0 + i % 30, 0.5, gemm.CANDIDATES[i % 8])
        for i, of in enumerate(tuner.products(["qwen3-4b"], tuner.TOKENS, tuner.RANKS))
    ]
    path = tiles.path_of("A GPU of 2040")
    assert path.parent == folder
    tuner.write(path, tuner.table("for the test", skinny, measured))
    assert [one.name for one in folder.iterdir() if one.suffix != ".json"] == []
    text = path.read_text()
    assert json.loads(text)["about"] == "for the test"
    assert len(text.splitlines()) == len(skinny) + len(measured) + 7
    assert tiles.table("A GPU of 2040") == tuple(skinny)
    assert gemm.measurements("A GPU of 2040") == tuple(measured)
    for tile in skinny:
        found = tiles.find(tile.kernel, torch.bfloat16, tile.m, tile.k, tile.r, device="A GPU of 2040")
        assert found == tile
    wins = 0
    for row in measured:
        found = gemm.chosen(row.layout, torch.bfloat16, row.m, row.n, row.k, row.r, "A GPU of 2040")
        assert found == (row.tile if row.wins else None)
        wins += row.wins
    assert 0 < wins < len(measured)


def test_nothing_measured_is_a_table_too(folder):
    tuner.write(tiles.path_of("GPU"), tuner.table("for the test", [], []))
    assert tiles.table("GPU") == gemm.measurements("GPU") == ()


def test_spread_is_half_the_quartiles_distance():
    assert tuner.spread([float(i) for i in range(1, 12)]) == 3.0


@pytest.fixture
def stopwatch(monkeypatch) -> None:
    """The tuner where Triton interprets: the n-th contestant of a race takes 100 - n µs, and everything fits."""

    def race(contestants, rounds):
        for call in contestants.values():
            call()
        return {name: [100.0 - i] * rounds for i, name in enumerate(contestants)}

    monkeypatch.setattr(tuner, "DEVICE", DEVICE)
    monkeypatch.setattr(tuner, "race", race)
    monkeypatch.setattr(tuner, "INTERPRETED", False)  # so that the GEMM is tried with descriptors too
    monkeypatch.setattr(tuner, "fits", lambda what, call, kernel: call() is None or True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "interpreter")


interprets = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreted.py")


@interprets
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_measures_the_gemm(layout, stopwatch):
    of = tuner.Product(layout, 40, 72, 64, 8)
    found = tuner.tune_gemm(of, torch.bfloat16, 3)
    times = {"ours_us": 100.0, "torch_us": 99.0, "noise_us": 0.0}
    assert found == gemm.Measurement(**of._asdict(), dtype="bfloat16", **times, tile=gemm.CANDIDATES[-1])


@interprets
@pytest.mark.parametrize("kernel", ["shrink", "outer", "grad_t"])
def test_measures_tiles(kernel, stopwatch):
    of = tuner.Skinny(kernel, 80, 64, 16)
    last = tuner.skinny_tiles(of, torch.bfloat16)[-1]  # wins; and then the last of its stages
    assert tuner.tune_skinny(of, torch.bfloat16, 3) == dataclasses.replace(last, stages=4)
    assert tiles.forced == {}


@interprets
def test_one_pass_and_two_are_compared(stopwatch, capsys):
    tuner.tune_skinny(tuner.Skinny("grad_t", 80, 64, 16), torch.bfloat16, 3)
    assert "one pass over dy 100.0 µs, two 99.0 µs" in capsys.readouterr().out


@interprets
def test_a_wrong_candidate_is_left_out(stopwatch, monkeypatch, capsys):
    run, bad = gemm.run, gemm.CANDIDATES[-1]

    def off(tile, out, P, Q, T, S, alpha):
        run(tile, out, P, Q, T, S, 1.1 * alpha if tile == bad else alpha)

    monkeypatch.setattr(gemm, "run", off)
    monkeypatch.setattr(tuner, "wrong", [])
    found = tuner.tune_gemm(tuner.Product("nk", 40, 72, 64, 8), torch.bfloat16, 3)
    assert found.tile == gemm.CANDIDATES[-2]
    assert len(tuner.wrong) == 1
    assert "is wrong by" in tuner.wrong[0]
    assert tuner.wrong[0] in capsys.readouterr().out


@interprets
def test_a_candidate_that_raises_is_left_out(monkeypatch):
    def broken():
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(tuner, "wrong", [])
    assert not tuner.fits("a tile", broken, "gemm_kernel")
    assert "PassManager::run failed" in tuner.wrong[0]


def test_nothing_begins_after_its_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tuner.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tuner, "ends", 2.0)
    begun = []
    for candidate in tuner.in_time(range(9)):
        begun.append(candidate)
        now[0] += 1.5
    assert begun == [0, 1]
    assert list(tuner.in_time("ab")) == ["a"]  # one is always tried: a row is better than none


def run_main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    return tuner.main()


@interprets
def test_a_run_cut_short_leaves_its_rows(stopwatch, folder, monkeypatch):
    tune, seen = tuner.tune_gemm, []

    def second_fails(of, *rest):
        seen.append(of)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return tune(of, *rest)

    monkeypatch.setattr(tuner, "tune_gemm", second_fails)
    monkeypatch.setattr(tuner, "tune_skinny", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, "--models", "minilm", "--tokens", "32", "--ranks", "8", "--rounds", "2")
    (row,) = gemm.measurements("interpreter")
    assert (row.layout, row.m, row.n, row.k, row.r) == seen[0]


@interprets
def test_the_whole_run(stopwatch, folder, monkeypatch, capsys):
    small = shapes.Geometry(1, (("up", 64, 32), ("down", 32, 64)))
    monkeypatch.setitem(shapes.GEOMETRIES, "small", small)
    arguments = ("--models", "small", "--tokens", "48", "--ranks", "8", "16", "--rounds", "2")
    assert run_main(monkeypatch, *arguments) == 0
    tiles.rows.cache_clear()  # the next process, which finds the file
    assert len(gemm.measurements("interpreter")) == 8
    assert len(tiles.table("interpreter")) == 2 * 3
    assert "the GEMM wins 0 of them; 0 candidates were wrong or raised" in capsys.readouterr().out


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="Triton interprets, or there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^[^\n]*no CUDA or ROCm device[^\n]*$"):
        run_main(monkeypatch, "--device-json", str(tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCH / "tune_lora_gemm.py"), "--device-json", str(out), "--models", "minilm"]
    command += ["--tokens", "2048", "--ranks", "8", "--rounds", "3", "--seconds", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert content["gemm"]
    assert content["tiles"]
