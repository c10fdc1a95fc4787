"""Every Triton kernel with its default tiles (the GEMM: its candidates), compiled for GPUs that are not here: no spill,
no trap, shared memory within the device's; on sm_90 the GEMM has Hopper's own instructions.

What Triton would not refuse by itself: it emits code that spills registers, needs more shared memory than there is,
or stops at a bare trap. What it does refuse differs between its versions: these two files also pass under the oldest
that is served, in an environment with `triton==3.6.*` and `numpy<2.4`.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process and compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from slao_kernels.ops.expert_linear import device as experts  # noqa: E402
from slao_kernels.ops.expert_linear import kernels as expert_kernels  # noqa: E402
from slao_kernels.ops.lora_linear import gemm, tiles  # noqa: E402
from slao_kernels.ops.lora_linear import triton_kernels as kernels  # noqa: E402

# name -> (target, bytes of shared memory that a block may have)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
# Tiles are chosen by what Triton from 3.8 on makes of them, which spills nothing. Before, a thread spills eight
# registers here and there, 56 at rank 256 on sm_80, and 82 in sm_100's fp64 products. In bytes.
MODERN = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)
SPILL = 0 if MODERN else 512

_POINTERS = {"x", "A", "out", "seed", "g", "dy", "t", "B", "dB", "workspace", "P", "Q", "T", "S", "bias"}
_POINTERS |= {"G", "X", "ends"}
_FLOATS = {"alpha", "scaling"}
# A dense matrix's columns are next to each other; Triton makes a 1 a constant.
_DENSE = {"stride_xk", "stride_ak", "stride_yn", "stride_tr", "stride_br", "stride_gr", "stride_ok"}
# shrink(dy, Bᵀ) and dBᵀ = tᵀ dy: the small matrix lies the other way round.
_FLIPPED = _DENSE - {"stride_ak", "stride_ok"} | {"stride_ar", "stride_or"}
_NEVER_ALIGNED = {"M", "keep_below", "size", "parts"}
# Integers that are no multiple of 16, for Triton's specialisation: nothing; the rank (r = 8); all sizes.
_OF_THE_RANK = {"R", "stride_gm", "stride_tm", "stride_bn", "stride_t"}


def spread(*columns: Any) -> list[Any]:
    """Every combination takes a second or two to compile, and minutes in all: an eighth of them, spread over each
    column's values, is not exhaustive, another eighth is, so that each case (of the GEMM: tile) has one GPU;
    SLAO_COMPILE=all for the others, where a kernel or a tile changes."""
    found = []
    for picked in product(*(list(enumerate(column)) for column in columns)):
        part = sum(place for place, _ in picked) % 8
        if part in (0, 4) or os.environ.get("SLAO_COMPILE") == "all":
            marks = [pytest.mark.exhaustive] if part else []
            found.append(pytest.param(*(value for _, value in picked), marks=marks))
    return found


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes; `spilled` in bytes (NVIDIA) or registers (AMD)."""

    registers: int
    shared: int
    spilled: int
    trap: bool
    text: str = field(repr=False)


def compiled(
    kernel: Any,
    target: GPUTarget,
    types: dict[str, Any],
    options: dict[str, Any],
    layout: str,
    more: frozenset[str] = frozenset(),
) -> Usage:
    """Usage of `kernel`; `types`: pointer name -> element type, and constants.

    layout: "multiples of 16", "odd rank", "flipped" (with an odd rank), "odd sizes", or "size" (of a sum in parts).
    more: integers that are no multiple of 16, whatever the layout.
    """
    signature, constants, attributes = {}, {}, {}
    dense, odd = (_FLIPPED if layout == "flipped" else _DENSE), _NEVER_ALIGNED | more
    if layout in ("odd rank", "flipped"):
        odd |= _OF_THE_RANK | ({"stride_ak", "stride_ok"} if layout == "flipped" else set())
        odd |= {"stride_s"} if types.get("S_BY_N") else set()
    for i, name in enumerate(kernel.arg_names):
        if name in types and not isinstance(types[name], str):
            signature[name], constants[(i,)] = "constexpr", types[name]
        elif name in ("seed", "bias") and name not in types:
            signature[name], constants[(i,)] = "constexpr", None
        elif name in dense:
            signature[name], constants[(i,)] = "constexpr", 1
        elif name in _FLOATS:
            signature[name] = "fp32"
        else:
            pointer = name in _POINTERS
            signature[name] = f"*{types[name]}" if pointer else "i32"
            if pointer or (layout != "odd sizes" and name not in odd) or name == layout:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return measured(ASTSource(kernel, signature, constants, attributes), target, options)


def measured(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Usage:
    binary = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)
        (registers,) = re.findall(r"\.vgpr_count:\s*(\d+)", text)
        assert len(spills) == 2
        return Usage(int(registers), binary.metadata.shared, sum(map(int, spills)), "s_trap" in text, text)
    # What is spilled lies on the stack.
    (registers, stack), text = _resources(binary.asm["cubin"]), binary.asm["ptx"]
    return Usage(registers, binary.metadata.shared, stack, re.search(r"\btrap;", text) is not None, text)


def check_fits(found: Usage, target: str) -> None:
    assert not found.trap, found
    assert found.spilled <= SPILL, found
    assert found.shared <= TARGETS[target][1], found


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return int(found[0]), int(found[1])


def usage(tile: tiles.Tile, target: str, dtype: str, dropout: bool = False, layout: str = "odd rank") -> Usage:
    """Usage of the kernel that `tile` is for, with the types that triton.py gives it."""
    where, _ = TARGETS[target]
    compute = {"bf16": triton.language.bfloat16, "fp16": triton.language.float16, "fp32": triton.language.float32}
    types: dict[str, Any] = {"COMPUTE": compute[dtype], "BLOCK_M": tile.block_m, "BLOCK_R": tile.block_r}
    types["BLOCK_K"] = tile.block_k
    types |= dict.fromkeys(("x", "A", "g", "dy", "t", "B"), dtype)
    # Sums in parts land in an fp32 workspace; that is the wider store.
    types |= {"out": dtype if tile.kernel == "expand_dropped" else "fp32", "dB": "fp32"}
    if tile.kernel == "grad_t":
        types["g"] = "fp32"
    if dropout:
        types["seed"] = "i64"
    stages = min(tile.stages, 2) if where.backend == "hip" else tile.stages
    options = {"num_warps": tile.warps, "num_stages": stages, "enable_fp_fusion": True}
    return compiled(getattr(kernels, f"{tile.kernel}_kernel"), where, types, options, layout)


def cases() -> dict[str, tuple[tiles.Tile, str, bool, str]]:
    """name -> (tile, dtype, dropout, layout): each default tile in the hardest layout that triton.py gives it."""
    found = {}
    for tile in tiles.table("default"):
        dtype = "bf16" if tile.bits == 16 else "fp32"
        always, never = tile.kernel == "expand_dropped", tile.kernel == "grad_t"
        layout = "odd sizes" if not tile.aligned else "multiples of 16" if never and tile.r > 16 else "odd rank"
        for dropout in {always, not never}:
            blocks = f"{tile.kernel}-{dtype}-{tile.block_m}x{tile.block_k}x{tile.block_r}"
            name = f"{blocks}-{'dropout' if dropout else 'plain'}-{layout.replace(' ', '_')}"
            found.setdefault(name, (tile, dtype, dropout, layout))
    for kernel in ("shrink", "outer", "grad_t", "expand_dropped"):
        half = tiles.find(kernel, torch.float16, 4096, 4096, 16)
        assert half is not None
        found[f"{kernel}-fp16-r16"] = (half, "fp16", kernel == "expand_dropped", "multiples of 16")
    for r in (16, 64, 256):
        flipped = tiles.find("outer", torch.bfloat16, 4096, 4096, r)
        assert flipped is not None
        found[f"outer-bf16-r{r}-flipped"] = (flipped, "bf16", False, "flipped")
    return found


CASES = cases()


@pytest.mark.parametrize(("case", "target"), spread(CASES, TARGETS))
def test_fits_without_a_spill(case, target):
    tile, dtype, dropout, layout = CASES[case]
    check_fits(usage(tile, target, dtype, dropout, layout), target)


def reduction(target: str, layout: str, step: int) -> Usage:
    types = {"workspace": "fp32", "out": "bf16", "BLOCK": kernels.REDUCE_BLOCK, "STEP": step}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return compiled(kernels.reduce_kernel, TARGETS[target][0], types, options, layout)


@pytest.mark.parametrize("step", [2, kernels.REDUCE_STEP])
@pytest.mark.parametrize("target", TARGETS)
def test_reduction(target, step):
    check_fits(reduction(target, "odd sizes", step), target)


def test_reduction_has_its_loads_on_the_way_together():
    """All parts of a step, 16 bytes a load, before the first of them is added."""
    text = reduction("sm_90", "size", kernels.REDUCE_STEP).text
    loop = text[text.index("ld.global") :]
    before = loop[: re.search(r"\badd(?:\.rn)?\.f32", loop).start()]
    assert before.count("ld.global.v4.b32") == kernels.REDUCE_BLOCK * kernels.REDUCE_STEP // (4 * 128)  # 128 threads


# The GEMM: target -> the candidates that have to fit there. On sm_100 the tuner leaves out the others, which spill some
# registers; elsewhere it is the loads that differ, by descriptors or by pointers.
_TMA, _POINTER = ([tile for tile in gemm.CANDIDATES if tile.tma is tma] for tma in (True, False))
GEMM_TILES = {"sm_80": _POINTER, "gfx942": _POINTER, "sm_90": _TMA, "sm_100": [_TMA[0], _TMA[3]]}
# rank -> whether it and its matrices' rows are multiples of 8
GEMM_RANKS = {
    "r = 1": (1, False),
    "r = 12": (12, False),
    "r = 8": (8, True),
    "r = 32": (32, True),
    "r = 64": (64, True),
}


def gemm_usage(tile: gemm.Tile, target: str, r: int, by_8: bool, forward: bool, dtype: str = "bf16") -> Usage:
    """Usage of the GEMM as gemm.py launches it: forward (W and B read by their rows, with a bias), or for dx."""
    types: dict[str, Any] = dict.fromkeys(("P", "Q", "T", "S", "out"), dtype) | ({"bias": dtype} if forward else {})
    types |= {"COMPUTE": triton.language.bfloat16 if dtype == "bf16" else triton.language.float16, "TMA": tile.tma}
    types |= {"Q_BY_N": forward, "S_BY_N": forward, "RANK_BY_8": by_8, "GROUP_M": tile.group_m}
    types |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    types["BLOCK_R"] = gemm.rank_block(r, by_8)
    if r == 1:  # Triton makes a 1 a constant; B (N, 1) is read as one row
        types |= {"R": 1, "stride_t": 1} | ({"S_BY_N": False, "stride_s": 1} if forward else {})
    where, _ = TARGETS[target]
    stages = min(tile.stages, 2) if where.backend == "hip" else tile.stages
    options = {"num_warps": tile.warps, "num_stages": stages, "enable_fp_fusion": True}
    return compiled(gemm.gemm_kernel, where, types, options, "odd rank")


GEMMS = {
    f"{target}-{tile.block_m}x{tile.block_n}x{tile.block_k}": (target, tile)
    for target, listed in GEMM_TILES.items()
    for tile in listed
}


@pytest.mark.parametrize(("gemm_tile", "rank", "way"), spread(GEMMS, GEMM_RANKS, ("forward", "dx")))
def test_gemm_fits_without_a_spill(gemm_tile, rank, way):
    target, tile = GEMMS[gemm_tile]
    check_fits(gemm_usage(tile, target, *GEMM_RANKS[rank], way == "forward"), target)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "dx"])
def test_gemm_is_hoppers(forward, dtype):
    """Descriptors for P, Q and the output, each of the loads and the store by the copy engine, all products wgmma's."""
    found = gemm_usage(_TMA[0], "sm_90", 16, True, forward, dtype)
    assert (found.spilled, found.trap) == (0, False), found
    loads = re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared\S*\.global", found.text)
    stores = re.findall(r"cp\.async\.bulk\.tensor\.2d\.global\.shared", found.text)
    # Two matrices: two stages ahead of the loop of three stages, and in it.
    assert (len(loads), len(stores)) == (6, 1)
    assert found.text.count("wgmma.mma_async") == 5  # 16 ranks at once, and 64 of K in four
    assert "mma.sync" not in found.text


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "dx"])
def test_gemm_elsewhere(forward):
    """On sm_100 the copy engine and its own products; by pointers on sm_80 copies ahead of the products."""
    newer, older = (
        gemm_usage(tile, sm, 16, True, forward).text for tile, sm in ((_TMA[0], "sm_100"), (_POINTER[0], "sm_80"))
    )
    assert "cp.async.bulk.tensor.2d.shared" in newer
    assert "tcgen05.mma" in newer
    assert "cp.async.cg.shared.global" in older
    assert "mma.sync" in older


def test_a_spill_is_seen():
    """A tile that is known not to fit: else a change of the tools would let everything pass."""
    tile = tiles.Tile("grad_t", 16, 256, block_m=128, block_k=64, block_r=256, warps=4, stages=2)
    assert usage(tile, "sm_80", "bf16").spilled > 0
    assert usage(tile, "gfx942", "bf16").spilled > 0


def test_too_much_shared_memory_is_seen():
    tile = tiles.Tile("shrink", 16, 256, block_m=128, block_k=128, block_r=256, warps=8, stages=4)
    assert usage(tile, "sm_90", "bf16").shared > TARGETS["sm_90"][1]


def expert_usage(name: str, dtype: str, target: str, r: int, by_n: bool, aligned: bool = True) -> Usage:
    """Usage of a kernel of the experts' as expert_linear/kernels.py launches it: `name` of a tile there, or "plain" for
    a base without a branch. by_n: in forward (of "outer": dB); else in backward."""
    compute = {"bf16": triton.language.bfloat16, "fp16": triton.language.float16, "fp32": triton.language.float32}
    bits, by_8 = 32 if dtype == "fp32" else 16, aligned and r % 8 == 0
    tile = expert_kernels.TILES["base" if name == "plain" else name, bits] if aligned else expert_kernels.ODD
    types: dict[str, Any] = {"COMPUTE": compute[dtype], "BY_8": by_8, "ends": "i32", "out": dtype}
    types |= expert_kernels.blocks(name, tile, r, by_8)
    where, _ = TARGETS[target]
    stages = min(tile.stages, 2) if where.backend == "hip" else tile.stages
    options = {"num_warps": tile.warps, "num_stages": stages, "enable_fp_fusion": True}
    layout = "multiples of 16" if aligned else "odd sizes"
    if name == "outer":
        types |= {"G": dtype, "X": dtype, "BY_K": by_n, "stride_xk": 1}
        return compiled(experts.outer_kernel, where, types, options, layout, frozenset("R" if r % 16 else ""))
    branch, base = name != "plain", name in ("base", "plain")
    types |= dict.fromkeys("TS", dtype if branch else None) | dict.fromkeys("PQ", dtype if base else None)
    types |= {"S_BY_N": by_n, "ADD": name == "expand", "BLOCK_E": 128}
    types |= dict.fromkeys(("stride_tr", "stride_pk", "stride_qk" if by_n else "stride_qn"), 1)
    odd = frozenset(() if r % 16 == 0 else ("N",) if name == "shrink" else ("R", "stride_tm"))
    return compiled(experts.rows_kernel, where, types, options, layout, odd)


EXPERTS = {
    f"{name}-{dtype}-r{r}-{'forward' if by_n else 'backward'}{'' if aligned else '-odd'}": [
        name,
        dtype,
        r,
        by_n,
        aligned,
    ]
    for name in ("shrink", "expand", "base", "plain", "outer")
    for dtype, r, aligned in (
        *(("bf16", r, True) for r in (8, 12, 64)),
        *(("fp32", r, True) for r in (8, 64)),
        ("fp16", 16, True),
        ("fp32", 64, False),
    )
    for by_n in (True, False)
    if (name != "plain" or r == 64) and (dtype != "fp16" or by_n)
}


@pytest.mark.parametrize(("case", "target"), spread(EXPERTS, TARGETS))
def test_experts_fit_without_a_spill(case, target):
    name, dtype, *rest = EXPERTS[case]
    check_fits(expert_usage(name, dtype, target, *rest), target)


def test_experts_are_pipelined():
    """Copies ahead of the products, of 16 bytes at rank 8 too; and Hopper's own products of the base."""
    older, newer = (expert_usage("base", "bf16", target, 8, True).text for target in ("sm_80", "sm_90"))
    assert "mma.sync" in older
    assert "wgmma.mma_async" in newer
    for name, by_n in product(("shrink", "expand", "base", "outer"), (True, False)):
        text = newer if (name, by_n) == ("base", True) else expert_usage(name, "bf16", "sm_90", 8, by_n).text
        assert "cp.async.cg.shared.global" in text
        assert set(re.findall(r"(?:ld|st)\.global\S*", text)) <= {
            "ld.global.v4.b32",
            "st.global.v4.b32",
            "ld.global.b32",
        }
        assert text.count("ld.global.b32") <= 4  # of `ends`
