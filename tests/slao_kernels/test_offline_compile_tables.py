"""The Triton kernels over tables of pointers, compiled for GPUs that are not here; see test_offline_compile.py."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process and compiles nothing", allow_module_level=True)

from test_offline_compile import MODERN, TARGETS, Usage, check_fits, measured, spread  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from slao_kernels.ops import tables  # noqa: E402
from slao_kernels.ops.fold import device as folding  # noqa: E402
from slao_kernels.ops.fold import kernels as fold  # noqa: E402
from slao_kernels.ops.orthogonal_init import device as init_device  # noqa: E402
from slao_kernels.ops.orthogonal_init import finish_device  # noqa: E402
from slao_kernels.ops.orthogonal_init import kernels as init  # noqa: E402
from slao_kernels.ops.scaled_merge import device as merging  # noqa: E402
from slao_kernels.ops.scaled_merge import kernels as merge  # noqa: E402

F64, F32, BF16, F16 = tables.TYPES
# Pointers to what the launchers allocate, which is aligned; the matrices themselves are integers in a table.
POINTERS = {"table": "*i64", "weights": "*fp64", "scalings": "*fp64"}
POINTERS |= {"ws": "*fp64", "states": "*i32", "status": "*i32", "info": "*i32"}


def compiled(kernel: Any, target: str, constants: dict[str, Any], warps: int) -> Usage:
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else POINTERS.get(name, "i32")
        if name in POINTERS:
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return measured(ASTSource(kernel, signature, values, attributes), TARGETS[target][0], options)


def skip_what_is_refused(target: str) -> None:
    """`dispatch._no_fp64_products` keeps the init from what Triton before 3.8 cannot compile."""
    if not MODERN and target in ("sm_100", "gfx942"):
        pytest.skip(f"Triton {triton.__version__} has no fp64 products for {target}, and dispatch says so")


# (destination, source); None: pairs of several dtypes in one launch
MERGES = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "fp32<-bf16": (F32, BF16),
    "bf16<-fp32": (BF16, F32),
    "any": (None, None),
    "fp64": (F64, F64),
    "fp64<-any": (F64, None),
}


def merge_usage(target: str, case: str) -> Usage:
    dst, src = MERGES[case]
    constants = merge.constants_of(dst, src, dst is F64) | {"SEARCH": 1024}
    return compiled(merging.merge_kernel, target, constants, tables.WARPS)


# (W, A, B, factors of the products, r); None: several dtypes in one launch
FOLDS = {
    "bf16 by bf16, r=16": (BF16, BF16, BF16, BF16, 16),
    "bf16 by fp32, r=16": (BF16, F32, F32, F32, 16),
    "fp32 by fp32, r=16": (F32, F32, F32, F32, 16),
    "fp16 by fp16, r=64": (F16, F16, F16, F16, 64),
    "any by any, r=64": (None, None, None, F32, 64),
    "fp64 by fp64, r=64": (F64, F64, F64, F64, 64),
    "any by any with fp64, r=64": (None, None, None, F64, 64),
    "fp64 by bf16, r=16": (F64, BF16, BF16, F64, 16),
    "fp64 by fp16 and fp32, r=64": (F64, F16, F32, F64, 64),
    "bf16 by fp64, r=16": (BF16, F64, F64, F64, 16),
    "fp16 by fp64 and bf16, r=64": (F16, F64, BF16, F64, 64),
}


def fold_usage(target: str, case: str) -> Usage:
    *types, operand, r = FOLDS[case]
    constants = fold.constants_of(*types, operand, F64 if operand is F64 else F32, r) | {"SEARCH": 1024}
    return compiled(folding.fold_kernel, target, constants, tables.WARPS)


USAGES = {"merge": (merge_usage, MERGES), "fold": (fold_usage, FOLDS)}


@pytest.mark.parametrize(
    ("named", "target"), spread([f"{op}: {case}" for op, (_, cases) in USAGES.items() for case in cases], TARGETS)
)
def test_fits_without_a_spill(named, target):
    op, _, case = named.partition(": ")
    check_fits(USAGES[op][0](target, case), target)


WIDE = [*(("merge", case) for case in ("fp32", "bf16", "any")), ("fold", "bf16 by bf16, r=16")]
WIDE += [("fold", "fp32 by fp32, r=16")]


@pytest.mark.parametrize(("op", "case"), WIDE)
def test_moves_16_bytes_at_once(op, case):
    text = USAGES[op][0]("sm_90", case).text
    assert re.search(r"ld\.global\.v4\.b32", text)
    assert re.search(r"st\.global\.v4\.b32", text)


# (dtype, dense)
INITS = {"fp32": (F32, True), "bf16": (BF16, True), "fp16": (F16, True), "fp64": (F64, True)}
INITS |= {"strided": (F32, False), "strided bf16": (BF16, False)}


def init_usage(target: str, kernel: str, case: str, side: int, later: bool = False, large: bool = False) -> Usage:
    kind, dense = INITS[case]
    width, columns, step, warps = init.TILES[side]
    later_kind = init.LATER.get(kind, kind)
    constants: dict[str, Any] = {"S": side}
    if kernel == "gram":
        constants |= {"LATER": later, "TYPE": later_kind if later else kind, "DENSE": dense, "K": width}
        constants |= {"CHUNK": init.CHUNK, "LARGE": large, "SEARCH": 1024}
        return compiled(init_device.gram_kernel, target, constants, warps)
    if kernel == "factor":
        constants |= {"LATER": later, "CHUNK": init.CHUNK}
        return compiled(init_device.factor_kernel, target, constants, init.FACTOR_WARPS[side])
    constants |= {"TYPE": kind, "LATER_TYPE": later_kind}
    if kernel == "apply":
        constants |= {"LATER": later, "DENSE": dense, "N": columns, "SEARCH": 1024}
        return compiled(init_device.apply_kernel, target, constants, warps)
    if kernel == "triangle":
        return compiled(finish_device.triangle_kernel, target, {"S": side}, warps)
    constants |= {"N": step}
    return compiled(finish_device.finish_kernel, target, constants, warps)


@pytest.mark.parametrize(
    ("kernel", "side", "target"), spread(["gram", "factor", "apply", "finish", "triangle"], [16, 32, 64], TARGETS)
)
def test_init_fits_without_a_spill(kernel, side, target):
    """The first pass; those that read the matrix, with each dtype in which a matrix is stored."""
    skip_what_is_refused(target)
    for case in INITS if kernel in ("gram", "apply") else ("fp32", "bf16") if kernel == "finish" else ("fp32",):
        check_fits(init_usage(target, kernel, case, side), target)


@pytest.mark.parametrize(("case", "target"), spread(["bf16", "fp16", "fp64"], TARGETS))
def test_init_of_later_passes(case, target):
    skip_what_is_refused(target)
    for kernel in ("gram", "factor", "apply"):
        check_fits(init_usage(target, kernel, case, 64, later=True, large=True), target)


@pytest.mark.parametrize(("case", "target"), spread(["fp32", "bf16", "fp16"], TARGETS))
def test_init_of_many_rows(case, target):
    """The first pass over blocks that have others beside them."""
    skip_what_is_refused(target)
    check_fits(init_usage(target, "gram", case, 64, large=True), target)


@pytest.mark.parametrize("target", TARGETS)
def test_init_above_64_rows(target):
    constants = {"S": 64}
    warps = init.TILES[64][3]
    check_fits(compiled(init_device.gather_kernel, target, constants | {"CHUNK": init.CHUNK}, warps), target)
    check_fits(compiled(init_device.decide_kernel, target, constants, warps), target)
