"""merge_adapter and unmerge_adapter of patched models: the base comes back bit for bit, or a line says why."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import twins
from kinds import build, x_of
from torch import Tensor, nn

import slao_kernels
from slao_kernels import exact_merge
from slao_kernels.testing import error_ratio

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def words(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def check_base(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = base_of(model)
    assert now.keys() == before.keys()
    changed = [name for name, tensor in now.items() if not torch.equal(words(tensor), words(before[name]))]
    assert not changed


def patched(kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    model = twins.peft_model(kind, dtype, **options)
    slao_kernels.patch(model)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=twins.token_ids()).logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_whole_model_again_and_again(kind, dtype):
    """The merged model answers as the adapter does; afterwards no bit has changed. PEFT's own round trips drift."""
    model, twin = patched(kind, dtype), twins.peft_model(kind, dtype)
    before, keys = base_of(model), list(model.state_dict())
    expected = logits(copy.deepcopy(model).double())
    for cycle in range(20):
        model.merge_adapter(safe_merge=cycle % 2 == 0)
        if cycle == 0:
            assert list(model.state_dict()) == keys
            rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
            assert error_ratio(logits(model), expected) <= rounding[dtype]
            assert any(not torch.equal(p, before[name]) for name, p in base_of(model).items())
        model.unmerge_adapter()
        if cycle < 10:
            twin.merge_adapter()
            twin.unmerge_adapter()
    check_base(model, before)
    if dtype.itemsize == 2:
        assert any(not torch.equal(p, before[name]) for name, p in base_of(twin).items())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_several_active_adapters(options):
    """Merged in one call or one by one, with ranks and biases of their own; Σ s_i B_i A_i is what was added."""
    model = build("two adapters", torch.bfloat16, torch.float32, **options)
    slao_kernels.patch(model)
    layer, before = model.proj, base_of(model)
    wide = copy.deepcopy(model).double()
    expected = wide(x_of().double()).detach()
    for steps in ([None], [["default"], ["other"]], [["other"], None]):
        for names in steps:
            layer.merge(adapter_names=names)
        assert sorted(layer.merged_adapters) == ["default", "other"]
        assert error_ratio(model(x_of(dtype=torch.bfloat16)), expected) <= 2e-2
        layer.unmerge()
        assert layer.merged_adapters == []
        assert "slao_kept" not in layer.__dict__
        check_base(model, before)


def test_what_the_adapter_does_while_it_is_merged_does_not_matter():
    model = patched()
    before = base_of(model)
    model.merge_adapter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(3.0)
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 7.0)
    model.unmerge_adapter()
    check_base(model, before)


def test_autocast_inference_mode_and_disabled_adapters():
    """PEFT's disable_adapter unmerges in the forward."""
    model = patched()
    before = base_of(model)
    with model.disable_adapter():
        expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
    model.unmerge_adapter()
    check_base(model, before)
    with torch.inference_mode():
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    check_base(model, before)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_merged_model_unmerge_by_themselves(how):
    model = patched()
    before = base_of(model)
    model.merge_adapter()
    copied = COPIES[how](model)
    for one in (copied, model):
        assert torch.equal(logits(one), logits(model))
    for one in (copied, model):
        one.unmerge_adapter()
        check_base(one, before)


def test_moved_and_wider_in_between():
    """What holds W' bit for bit unmerges; the base is then W in that dtype."""
    model = patched()
    before = base_of(model)
    model.merge_adapter()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
    model.float()
    model.unmerge_adapter()
    check_base(model, {name: tensor.float() for name, tensor in before.items()})


@pytest.mark.gpu
def test_moved_between_devices():
    model = patched()
    before = base_of(model)
    for there, back in (("cpu", "cuda"), ("cuda", "cpu")):
        model.to(there).merge_adapter()
        model.to(back).unmerge_adapter()
        check_base(model.cpu(), before)


def touch(model: Any) -> None:
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "base_layer.weight" in name)[1, 2] += 1


def touch_wider(model: Any) -> None:
    model.double()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "base_layer.weight" in name)[1, 2] += 1e-13


def touch_bias(model: Any) -> None:
    with torch.no_grad():
        model.proj.base_layer.bias[3] += 1


def load(model: Any) -> None:
    parameter = next(p for name, p in model.named_parameters() if "base_layer.weight" in name)
    parameter.data = torch.zeros_like(parameter)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one weight": (touch, "has changed since the fold"),
    "loaded anew": (load, "has changed since the fold"),
    "half": (lambda model: model.half(), "has changed since the fold"),
    "a little, in a wider dtype": (
        touch_wider,
        "base weight was torch.float32 when it was merged and has changed since",
    ),
    "bias": (touch_bias, "the base bias has changed since the merge"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_base_is_refused_in_one_line(change, told):
    """Nothing is written; unpatched it is PEFT's to subtract, which a line says too."""
    act, message = CHANGES[change]
    if change == "bias":
        model = build("lora_bias", torch.bfloat16)
        slao_kernels.patch(model)
        layer = model.proj
        layer.merge()
    else:
        model = patched(dtype=torch.float32)
        layer = next(module for module in model.modules() if "slao_options" in module.__dict__)
        model.merge_adapter()
    act(model)
    before = base_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        layer.unmerge()
    assert "\n" not in str(caught.value)
    assert layer.slao_options.name in str(caught.value)
    assert "slao_kernels.unpatch(model)" in str(caught.value)
    check_base(model, before)
    slao_kernels.unpatch(model)
    assert ["unmerging leaves rounding in the base: the layer is no longer patched" in line for line in told()] == [
        True
    ]
    layer.unmerge()
    assert not layer.merged_adapters


def test_deleted_while_merged_stays_merged_as_with_peft(told):
    """Whatever was merged below it is then PEFT's to subtract."""
    nets = [build("two adapters") for _ in range(2)]
    slao_kernels.patch(nets[0])
    for net in nets:
        net.proj.merge(adapter_names=["default"])
        net.proj.merge(adapter_names=["other"])
        net.proj.delete_adapter("other")
        net.proj.unmerge()
        assert net.proj.merged_adapters == []
    torch.testing.assert_close(nets[0].proj.base_layer.weight, nets[1].proj.base_layer.weight, rtol=1e-5, atol=1e-6)
    assert ["adapter 'other' was deleted while it was merged" in line for line in told()] == [True]


def test_merged_by_peft_before_and_exactly_after(told):
    net, plain = build("two adapters"), build("two adapters")
    for one in (net, plain):
        one.proj.merge(adapter_names=["default"])
    slao_kernels.patch(net)
    after = base_of(net)
    net.proj.merge(adapter_names=["other"])
    kept = net.proj.__dict__["slao_kept"][:]
    assert [one.adapter for one in kept] == ["other"]
    net.proj.unmerge()
    plain.proj.unmerge()
    for name, tensor in base_of(net).items():
        assert torch.equal(tensor, base_of(plain)[name])
    assert any(not torch.equal(tensor, after[name]) for name, tensor in base_of(net).items())
    assert told() == []


def test_what_peft_merges_is_its_own_to_unmerge(told):
    """DoRA: all that PEFT's merge does to the base, before and after the exact part is given up."""
    model = build("DoRA")
    slao_kernels.patch(model)
    model.proj.merge()
    assert "slao_kept" not in model.proj.__dict__
    assert told() == []  # nothing exact is lost
    twin = build("DoRA")
    twin.proj.merge()
    assert torch.equal(model.proj.base_layer.weight, twin.proj.base_layer.weight)
    model.proj.unmerge()
    twin.proj.unmerge()
    assert torch.equal(model.proj.base_layer.weight, twin.proj.base_layer.weight)


def test_a_safe_merge_refuses_nan_with_the_base_as_it_was():
    model = patched()
    before = base_of(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken: .*q_proj"
    ):
        model.merge_adapter(safe_merge=True)
    check_base(model, before)


def test_a_bias_that_the_base_has_no_room_for_is_an_error_before_anything_is_written():
    net = build("lora_bias, no bias")
    slao_kernels.patch(net)
    before = base_of(net)
    with pytest.raises(RuntimeError, match="because the base layer has no bias: proj, adapter 'default'"):
        net.proj.merge()
    check_base(net, before)
    assert net.proj.merged_adapters == []


def test_merge_and_unload_keeps_the_merge_and_nothing_else():
    model = patched(dtype=torch.float32)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert error_ratio(logits(merged), expected) <= 1e-5
    assert not any("slao_kept" in module.__dict__ for module in merged.modules())


def test_a_wish_for_other_kernels_does_not_stop_a_merge():
    model = patched()
    before = base_of(model)
    for backend in ("reference", "triton", "eager"):
        with slao_kernels.use_backend(backend):
            model.merge_adapter()
        model.unmerge_adapter()
        check_base(model, before)


def test_side_memory():
    """Under two bits a weight and the copies of A and B."""
    model = patched(r=2)
    model.merge_adapter()
    layers = [module for module in model.modules() if "slao_kept" in module.__dict__]
    assert len(layers) > 5
    for layer in layers:
        (one,) = layer.__dict__["slao_kept"]
        W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert one.kept.stream_bytes <= W.numel() * 2 / 8 + 64
        assert one.kept.nbytes == one.kept.stream_bytes + A.nbytes + B.nbytes


def layer_over(base: nn.Module, **options: Any) -> Any:
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **options)
    return peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]


def parametrized(layer: Any) -> Any:
    nn.utils.parametrizations.weight_norm(layer.base_layer)
    return layer


WHY_NOT: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: layer_over(nn.Linear(4, 4), use_dora=True), "adds more than a product of A and B"),
    "embedding": (lambda: layer_over(nn.Embedding(5, 4)), "adds no product of one A and B"),
    "convolution": (lambda: layer_over(nn.Conv2d(3, 4, 3)), "the base weight has 4 dimensions"),
    "meta": (lambda: layer_over(nn.Linear(4, 4)).to("meta"), "on meta"),
    "parametrized": (
        lambda: parametrized(layer_over(nn.Linear(4, 4))),
        "no plain tensor of its own",
    ),
}


@pytest.mark.parametrize("case", WHY_NOT)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_merged_exactly(case):
    make, message = WHY_NOT[case]
    assert message in str(exact_merge.why_not(make(), ["default"]))


def test_layers_that_share_a_weight_unmerge_in_reverse_only():
    """Of two folds into one weight the last is undone first: the other way round is refused, and nothing is lost."""
    layers = [layer_over(nn.Linear(6, 5)) for _ in range(2)]
    layers[1].base_layer.weight = layers[0].base_layer.weight
    before = layers[0].base_layer.weight.detach().clone()
    for layer in layers:
        exact_merge.merge(layer, ["default"])
    with pytest.raises(ValueError, match="has changed since the fold"):
        exact_merge.unmerge(layers[0])
    assert [exact_merge.unmerge(layer) for layer in reversed(layers)] == [True, True]
    assert torch.equal(layers[0].base_layer.weight, before)


def test_nothing_merged_is_left_to_peft():
    for kind, patch in itertools.product(["bias", "DoRA"], [False, True]):
        net = build(kind)
        if patch:
            slao_kernels.patch(net)
        with pytest.warns(UserWarning, match="Already unmerged"):
            net.proj.unmerge()
