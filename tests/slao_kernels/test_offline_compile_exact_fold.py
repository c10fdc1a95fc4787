"""The exact fold's Triton kernels, compiled for GPUs that are not here; see test_offline_compile.py.

Beside their registers: that fold and unfold round alike. No product and sum are one instruction, no denormal is a zero.
"""

from __future__ import annotations

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process and compiles nothing", allow_module_level=True)

import torch  # noqa: E402
from test_offline_compile import MODERN, TARGETS, Usage, check_fits, measured, spread  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from slao_kernels.ops.exact_fold import device, kernels  # noqa: E402

F64, F32, BF16, F16 = range(4)  # as a table has them
# W's dtype, what is computed in, whether rows begin at multiples of 16 bytes
CASES = {
    "bf16": (BF16, torch.float32, True),
    "fp16": (F16, torch.float32, True),
    "fp32": (F32, torch.float32, True),
    "fp64": (F64, torch.float64, True),
    "bf16 by fp64": (BF16, torch.float64, True),
    "fp32 by fp64": (F32, torch.float64, True),
    "odd bf16": (BF16, torch.float32, False),
    "odd fp32": (F32, torch.float32, False),
    "odd fp64": (F64, torch.float64, False),
}
KERNELS = {name: getattr(device, f"{name}_kernel") for name in ("measure", "fold", "unfold", "sum")}
POINTERS = {"table": "*i64", "found": "*i32", "starts": "*i64", "sums": "*i64", "damaged": "*i32"}
FUSED = r"\bfma\.|\bv_(?:pk_)?(?:fma|fmac|mac|mad)\w*_f(?:16|32|64)\b"


def usage(kernel: str, case: str, target: str, fused: bool = False) -> Usage:
    found = KERNELS[kernel]
    constants = kernels.constants_of(*CASES[case]) | {"SEARCH": 1024}
    words = {"stream": "*u64" if CASES[case][0] == F64 else "*u32"}
    signature, attributes = {}, {}
    for i, name in enumerate(found.arg_names):
        signature[name] = "constexpr" if name in constants else (POINTERS | words).get(name, "i32")
        if signature[name].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(found.arg_names.index(name),): value for name, value in constants.items()}
    options = kernels.OPTIONS | ({"enable_fp_fusion": True} if fused else {})
    return measured(ASTSource(found, signature, values, attributes), TARGETS[target][0], options)


def check_rounds(found: Usage, target: str) -> None:
    assert re.findall(FUSED, found.text) == []
    if target == "gfx942":
        modes = dict(re.findall(r"\.amdhsa_float_denorm_mode_(\w+) (\d)", found.text))
        assert modes == {"32": "3", "16_64": "3"}  # neither what is read nor what is written is flushed
    else:
        assert ".ftz" not in found.text


@pytest.mark.parametrize(("kernel", "case", "target"), spread(KERNELS, CASES, TARGETS))
def test_fits_without_a_spill_and_rounds_each_operation(kernel, case, target):
    found = usage(kernel, case, target)
    check_fits(found, target)
    check_rounds(found, target)


@pytest.mark.parametrize("target", TARGETS)
def test_a_fused_product_is_seen(target):
    """Were they compiled as the other kernels are, the check above would fail."""
    with pytest.raises(AssertionError):
        check_rounds(usage("unfold", "fp32", target, fused=True), target)


@pytest.mark.skipif(not MODERN, reason="Triton before 3.8 loads A an element at a time")
@pytest.mark.parametrize("case", ["bf16", "fp32"])
def test_five_loads_serve_16_products(case):
    """Four elements of A at once, and one of B for each of four rows; 16 bytes of A a load."""
    text = usage("unfold", case, "sm_90").text
    loop = text[: text.index("mul.rn.f32")]
    loop = loop[loop.rindex("Loop Header") :]
    assert (loop.count("ld.global.v4.b32"), loop.count("ld.global.b32")) == (1, 4)
    assert text.count("mul.rn.f32") == 16
