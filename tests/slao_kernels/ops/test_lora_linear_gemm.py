"""The GEMM with the rank-r term inside, with descriptors and by pointers: the product itself, and lora_linear on it.

Triton's interpreter has descriptors, and checks that what they describe starts at multiples of 16 bytes.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from on_triton import DEVICE, close, draw, empty, mask_of_the_next_call, on_device
from oracle import NAMES, OPS, check, compare, equal, exact, ours, run
from oracle import make as make_inputs
from torch import Tensor

from slao_kernels.testing import TOLERANCE, error_ratio

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.runtime import _allocation  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from slao_kernels.ops.lora_linear import gemm  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned", "fresh_tables")

DTYPES = [torch.bfloat16, torch.float16]
RANKS = [1, 8, 12, 16, 24, 64, 100, 256]
# (M, K, N): one row, no multiples of the tile, several groups of rows, and of 8 but not of 16
SIZES = [(1, 48, 64), (70, 200, 136), (300, 104, 72), (5, 8, 8)]
DEFAULTS = gemm.tiles.table("default")
TILES = {name: gemm.Tile(32, 64, 32, warps=4, stages=2, tma=name == "tma", group_m=3) for name in ("tma", "pointers")}


def product(m: int, k: int, n: int, r: int, dtype: torch.dtype, layout: str, bias: bool) -> tuple[Tensor, ...]:
    """(P, Q, T, S, bias); "nk": Q and S are transposed views, as in forward, else as in dx."""
    P, T = draw(m, k, dtype=dtype), draw(m, r, dtype=dtype, seed=1)
    Q, S = draw(k, n, dtype=dtype, seed=2, scale=k**-0.5), draw(r, n, dtype=dtype, seed=3, scale=r**-0.5)
    if layout == "nk":
        Q, S = Q.t().contiguous().t(), S.t().contiguous().t()
    return P, Q, T, S, draw(n, dtype=dtype, seed=4) if bias else None


def check_product(
    tile: gemm.Tile, P: Tensor, Q: Tensor, T: Tensor, S: Tensor, bias: Tensor | None, layout: str
) -> Tensor:
    """The product, which is the exact one rounded once, but for the order of an fp32 sum."""
    out, alpha = empty(P.shape[0], Q.shape[1], dtype=P.dtype), 0.7
    assert gemm.layout_of(out, P, Q, T, S, bias) == layout
    with gemm.tiles.force("gemm", tile):
        assert gemm.gemm_(out, P, Q, T, S, alpha, bias)
    right = P.double() @ Q.double() + alpha * T.double() @ S.double()
    right = right if bias is None else right + bias.double()
    close(out, right, right.to(P.dtype))
    return out


@on_device
@pytest.mark.parametrize("how", TILES)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", [DTYPES[0], pytest.param(DTYPES[1], marks=pytest.mark.exhaustive)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product(size, dtype, r, how):
    for layout, bias in (("nk", True), ("kn", False)):
        check_product(TILES[how], *product(*size, r, dtype, layout, bias), layout)


@on_device
@pytest.mark.parametrize("how", TILES)
@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("r", [8, 12])
def test_rows_of_larger_matrices(r, layout, how):
    """What a group and a split projection hand over: rows apart, and K and the first rank no multiples of anything."""
    P, Q, T, S, _ = product(70, 61, 72, r, torch.bfloat16, layout, False)
    P = torch.nn.functional.pad(P, (0, 19))[:, :61]
    if layout == "nk":
        Q = torch.nn.functional.pad(Q.t(), (0, 11))[:, :61].t()
    stacked = torch.cat([T[:, :5], T, T[:, :4]], 1)
    assert (P.stride(), stacked.stride()) == ((80, 1), (r + 9, 1))
    found = check_product(TILES[how], P, Q, stacked[:, 5 : 5 + r], S, None, layout)
    assert torch.equal(found, check_product(TILES[how], P, Q, T, S, None, layout))


@on_device
def test_every_tile_of_the_tuner_computes_the_same():
    args = product(300, 136, 264, 16, torch.bfloat16, "nk", True)
    for tile in gemm.CANDIDATES:
        if tile.tma and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            continue
        check_product(tile, *args, "nk")


def flat(P: Tensor) -> Tensor:
    """P as it lies one element behind a multiple of 16 bytes."""
    return torch.zeros(P.numel() + 1, dtype=P.dtype, device=DEVICE)[1:].view_as(P)


# what -> the operands, of (P, Q, T, S, bias) that would do
INELIGIBLE = {
    "fp32": lambda *operands: [operand.float() for operand in operands],
    "fp64": lambda *operands: [operand.double() for operand in operands],
    "x not at a multiple of 16 bytes": lambda P, *rest: (flat(P), *rest),
    "rows of x not at multiples of 16 bytes": lambda P, *rest: (torch.nn.functional.pad(P, (0, 3))[:, :48], *rest),
    "x transposed": lambda P, *rest: (P.t().contiguous().t(), *rest),
    "one row of x for all": lambda P, *rest: (P[:1].expand(20, 48), *rest),
    "t transposed": lambda P, Q, T, S, bias: (P, Q, T.t().contiguous().t(), S, bias),
    "bias with gaps": lambda P, Q, T, S, bias: (P, Q, T, S, torch.stack([bias, bias], 1)[:, 0]),
    "another dtype of bias": lambda P, Q, T, S, bias: (P, Q, T, S, bias.half()),
    "rank 257": lambda *_: product(20, 48, 64, 257, torch.bfloat16, "nk", True),
    "rank 0": lambda P, Q, T, S, bias: (P, Q, T[:, :0], S[:0], bias),
    "N no multiple of 8": lambda *_: product(20, 48, 60, 8, torch.bfloat16, "nk", True),
    "no rows": lambda P, Q, T, S, bias: (P[:0], Q, T[:0], S, bias),
    "no columns of x": lambda P, Q, T, S, bias: (P[:, :0], Q[:0], T, S, bias),
}


@on_device
@pytest.mark.parametrize("why", INELIGIBLE)
def test_what_the_kernel_does_not_take(why):
    P, Q, T, S, bias = INELIGIBLE[why](*product(20, 48, 64, 8, torch.bfloat16, "nk", True))
    out = empty(P.shape[0], Q.shape[1], dtype=P.dtype)
    with gemm.tiles.force("gemm", TILES["tma"]):
        assert not gemm.gemm_(out, P, Q, T, S, 0.7, bias)
    assert out.isnan().all()


def make(*shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return make_inputs(*shape, dtype, device=DEVICE)


# (op, (leading sizes of x, K, N, r), its weight transposed)
LAYERS = [
    ("linear", shape, conv1d)
    for conv1d in (False, True)
    for shape in (((1,), 64, 48, 8), ((2, 35), 40, 24, 12), ((130,), 96, 80, 64))
]
LAYERS += [("core and delta", ((5, 7), 48, 40, 8), False)]


@on_device
@pytest.mark.parametrize("how", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "shape", "conv1d"), LAYERS, ids=str)
def test_value_and_gradients(op, shape, conv1d, dtype, how, gemm_runs):
    inputs = make(*shape, dtype=dtype)
    expected = exact(op, inputs)
    if conv1d:
        inputs["weight"] = inputs["weight"].t().contiguous().t()
    with gemm.tiles.force("gemm", TILES[how]):
        found = ours(op, inputs, backend="triton")
        again = ours(op, inputs, backend="triton")
    # `run` clones leaves, which keeps strides: forward and dx, twice.
    assert gemm_runs == 2 * (["kn", "nk"] if conv1d else ["nk", "kn"])
    check(op, found, expected, inputs)
    equal(again, found)
    if op == "linear":  # t and g are rounded as before; y and dx are rounded once less
        torchs = ours(op, inputs, backend="eager")
        for name in ("out", "x"):
            assert error_ratio(found[name], expected[name]) <= 1.02 * error_ratio(torchs[name], expected[name])


@on_device
def test_dropout_takes_it_forward_only(gemm_runs):
    """In dx the rank's term alone is masked."""
    inputs = make((40,), 48, 40, 8)
    mask = mask_of_the_next_call(inputs["x"], 0.4)
    with gemm.tiles.force("gemm", TILES["tma"]):
        found = ours("linear", inputs, dropout=0.4, backend="triton")
    assert gemm_runs == ["nk"]
    compare(found, exact("linear", {**inputs, "mask": mask}), 1.5 * TOLERANCE[torch.bfloat16])


@on_device
def test_the_callers_allocator_stays():
    """Descriptors need memory from Triton's allocator, which belongs to the caller."""

    def own(size: int, align: int, stream: int | None) -> Tensor:
        raise AssertionError("the caller's allocator was asked")

    triton.set_allocator(own)
    check_product(TILES["tma"], *product(70, 200, 136, 8, torch.bfloat16, "nk", True), "nk")
    assert _allocation._allocator.get() is own


@on_device
def test_compiles_without_a_graph_break(gemm_runs):
    inputs = make((16,), 32, 24, 8)
    function = torch.compile(lambda t: OPS["linear"].ours(t, backend="triton"), fullgraph=True, backend="aot_eager")
    with gemm.tiles.force("gemm", TILES["tma"]):
        found = run(function, inputs, NAMES)
    assert gemm_runs == ["nk", "kn"]
    check("linear", found, exact("linear", inputs), inputs)


@pytest.fixture
def table(tmp_path, monkeypatch) -> None:
    """The device's own file: dx of (70, 48, 40) wins at rank 8, its forward loses."""
    device, _ = gemm.tiles.device_of(0 if DEVICE == "cuda" else None)
    row = {"dtype": "bfloat16", "m": 60, "r": 8, "ours_us": 9, "noise_us": 0.5}
    row |= {"tile": dataclasses.asdict(TILES["tma"])}
    rows = [
        {**row, "layout": "nk", "n": 40, "k": 48, "torch_us": 9.4},
        {**row, "layout": "kn", "n": 48, "k": 40, "torch_us": 9.6},
    ]
    monkeypatch.setattr(gemm.tiles, "FOLDER", tmp_path)
    gemm.tiles.path_of(device).write_text(json.dumps({"gemm": rows}))
    gemm.tiles.path_of("default").write_text(json.dumps({"tiles": [dataclasses.asdict(t) for t in DEFAULTS]}))


@on_device
def test_a_table_turns_it_on(table, gemm_runs):
    inputs = make((70,), 48, 40, 8)
    found = ours("linear", inputs, backend="triton")
    assert gemm_runs == ["kn"]
    check("linear", found, exact("linear", inputs), inputs)


@on_device
def test_a_tile_that_does_not_fit_is_left_out(table, monkeypatch):
    """A table from another version of Triton, whose kernels need more: one warning, and torch's products."""
    asked = []

    def launch(*arguments, **constants):
        asked.append(arguments)
        raise OutOfResources(240 << 10, 227 << 10, "shared memory")

    monkeypatch.setattr(gemm, "launch", launch)
    monkeypatch.setattr(gemm, "_unfit", set())
    inputs = make((70,), 48, 40, 8)
    with pytest.warns(UserWarning, match="does not fit on .* torch's products serve: out of resource: shared memory"):
        found = ours("linear", inputs, backend="triton")
    again = ours("linear", inputs, backend="triton")
    assert len(asked) == 1
    equal(again, found)
    check("linear", found, exact("linear", inputs), inputs)
    with gemm.tiles.force("gemm", TILES["pointers"]), pytest.raises(OutOfResources):
        ours("linear", inputs, backend="triton")
