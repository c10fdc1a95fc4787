"""`slao merge` of adapters that do not match: other layers, names of one base, parts that only some have, pickles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from slao import sums
from slao.cli import main
from slao.export import save_adapter
from slao.folders import read_adapter
from slao.merging import METHODS, factors, merge_adapters
from slao_kernels.testing import error_ratio, tiny_model


def make(tiny, folder: Path, seed: int, targets: object = ("query", "value"), name: str = "tiny/bert", **options):
    targets = list(targets) if isinstance(targets, tuple) else targets
    model = tiny.adapted("bert", fused=False, target_modules=targets, **options)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=g))
    model.config._name_or_path = name
    save_adapter(model, folder)
    return folder


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {name: s * B.double() @ A.double() for name, (A, B, s) in read_adapter(folder).items()}


def summed(folders: list[Path], weight: float) -> dict[str, torch.Tensor]:
    """Σ weight · delta over those that have the layer."""
    found: dict[str, torch.Tensor] = {}
    for folder in folders:
        for name, delta in deltas(folder).items():
            found[name] = found.get(name, 0) + weight * delta
    return found


def best(delta: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


# --- other layers ----------------------------------------------------------------------------------------------------

TARGETS = (("query", "value"), ("value", "key"), r".*layer\.1.*\.(query|dense)")


@pytest.fixture(scope="module")
def apart(tiny, tmp_path_factory) -> list[Path]:
    parent = tmp_path_factory.mktemp("apart")
    return [make(tiny, parent / f"{seed}", seed, targets) for seed, targets in enumerate(TARGETS)]


def test_the_sum_counts_an_absent_layer_as_zero(apart, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["merge", *map(str, apart), "-o", str(out), "--method", "svd"]
    assert main(words) == 2
    assert "are in one only, such as" in (err := capsys.readouterr().err)
    assert "(--union counts an absent one as zero)" in err
    assert main([*words, "--union", "--weights", "1,1,1"]) == 0
    found, expected = deltas(out), summed(apart, 1)
    assert found.keys() == expected.keys()
    assert all(error_ratio(found[name], best(expected[name], 4)) <= 1e-6 for name in expected)
    every = [set(deltas(folder)) for folder in apart]
    some = len(set.union(*every)) - len(set.intersection(*every))
    assert f"{some} of {len(found)} layers are not in every adapter, and count as zero" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 3])
def test_every_method_writes_what_peft_loads(method, count, apart, tiny, tmp_path):
    """By the union of short names (two lists), by whole names (a regular expression is among them); no layer more."""
    out = tmp_path / "out"
    merge_adapters(apart[:count], out, method, union=True)
    model = PeftModel.from_pretrained(tiny.bert(), out)
    found = deltas(out)
    layers = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert layers == found.keys() == summed(apart[:count], 1).keys()
    for name, delta in found.items():
        assert error_ratio(model.base_model.model.get_submodule(name).get_delta_weight("default"), delta) <= 1e-6
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert targets == (["key", "query", "value"] if count == 2 else sorted(found))


def test_slao_averages_with_zero_over_the_last_a(apart, tmp_path):
    """B <- B + λ (B_i − B) with B_i = 0 where the adapter has no such layer, A of the last that has it."""
    merge_adapters(apart, tmp_path / "out", schedule=0.25, union=True)
    found, each = read_adapter(tmp_path / "out"), [read_adapter(folder) for folder in apart]
    for name, (A, B, scaling) in found.items():
        having = [adapter[name] for adapter in each if name in adapter]
        merged = torch.zeros_like(B).double()
        for index, adapter in enumerate(each):
            own = adapter[name][1].double() if name in adapter else 0
            merged = own + merged if index == 0 else merged + 0.25 * (own - merged)
        assert torch.equal(A, having[-1][0])
        assert error_ratio(scaling * B, having[-1][2] * merged) <= 1e-6


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_those_of_a_and_b_take_zeros(method, apart, tmp_path):
    merge_adapters(apart, tmp_path / "out", method, union=True, weights=[1, 1, 1])
    found, each = read_adapter(tmp_path / "out"), [read_adapter(folder) for folder in apart]
    for name, (A, B, _) in found.items():
        having = [adapter[name] for adapter in each if name in adapter]
        zero = torch.zeros_like(having[0][0]), torch.zeros_like(having[0][1])
        pairs = [adapter[name][:2] if name in adapter else zero for adapter in each]
        given = [having[0][2]] * 3
        expected = {
            "linear": lambda pairs=pairs, given=given: factors.linear(pairs, given),
            "ties": lambda pairs=pairs, given=given: factors.ties(pairs, given, 0.2),
            "dare_ties": lambda pairs=pairs, given=given, name=name: factors.dare_ties(pairs, given, 0.2, 0, name),
        }[method]()
        assert torch.equal(A, expected[0])
        assert torch.equal(B, expected[1])


# --- names of one base -----------------------------------------------------------------------------------------------


def test_two_names_of_one_base(tiny, tmp_path, capsys):
    names = ["tiny/bert", "/models/bert", "tiny/other"]
    a, b, c = (make(tiny, tmp_path / "in" / str(seed), seed, name=name) for seed, name in enumerate(names))
    words = ["merge", "-o", str(tmp_path / "out"), "--method", "svd"]
    assert main([*words, str(a), str(b)]) == 2
    assert "(if these are one model: --same-base tiny/bert=/models/bert)" in capsys.readouterr().err
    assert main([*words, str(a), str(b), "--same-base", "tiny/bert=/models/bert/"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "/models/bert"
    shutil.rmtree(tmp_path / "out")
    assert main([*words, str(a), str(b), str(c), "--same-base", "/models/bert=tiny/bert"]) == 2
    assert "base_model_name_or_path is 'tiny/other'" in (err := capsys.readouterr().err)
    assert "'/models/bert'" not in err
    both = ["--same-base", "/models/bert=tiny/bert", "--same-base", "tiny/other=/models/bert"]
    assert main([*words, str(a), str(b), str(c), *both]) == 0


@pytest.mark.parametrize(("given", "message"), [
    ("tiny/bert", "takes two names, A=B, not 'tiny/bert'"),
    ("tiny/bert=", "takes two names, A=B, not 'tiny/bert='"),
    ("tiny/bert=x", "'x' is no adapter's base; theirs are 'tiny/bert'"),
])  # fmt: skip
def test_names_that_are_refused(given, message, tiny, tmp_path, capsys):
    a, b = (make(tiny, tmp_path / "in" / str(seed), seed) for seed in range(2))
    assert main(["merge", str(a), str(b), "-o", str(tmp_path / "out"), "--same-base", given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- beside A and B --------------------------------------------------------------------------------------------------


def llama(folder: Path, seed: int, **options) -> Path:
    model = get_peft_model(tiny_model("llama"), LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options}))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=g))
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(("how", "said"), [
    ("keep", "the last adapter's that has it"),
    ("first", "the first adapter's that has it"),
    ("merge", "averaged, 0.25 + 0.25 + 0.5"),
])  # fmt: skip
def test_what_became_of_a_head_is_said(how, said, tmp_path, capsys):
    folders = [llama(tmp_path / str(seed), seed, modules_to_save=["lm_head"]) for seed in range(3)]
    out = tmp_path / "out"
    words = ["merge", *map(str, folders), "-o", str(out), "--method", "svd", "--weights", "1,1,2", "--beside", how]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"beside A and B: modules_to_save: {said}"
    key = "base_model.model.lm_head.weight"
    one, two, three, found = (load_file(each / "adapter_model.safetensors")[key] for each in (*folders, out))
    expected = {"keep": three, "first": one, "merge": (one.double() + two + 2 * three.double()) / 4}[how]
    assert error_ratio(found, expected) <= (3e-7 if how == "merge" else 0)


def test_parts_that_only_some_have(tmp_path, capsys):
    a = llama(tmp_path / "a", 0, modules_to_save=["lm_head"])
    b = llama(tmp_path / "b", 1, target_modules=["v_proj"], trainable_token_indices=[3, 4])
    c = llama(tmp_path / "c", 2)
    out = tmp_path / "out"
    words = ["merge", str(a), str(b), str(c), "-o", str(out), "--method", "svd", "--beside"]
    assert main(["merge", str(a), str(c), "-o", str(out), "--beside", "keep"]) == 2
    assert "only (--union takes it, with --beside keep or first)" in capsys.readouterr().err
    assert main([*words, "merge", "--union"]) == 2
    assert "lm_head.weight is in" in capsys.readouterr().err
    assert main([*words, "keep", "--union"]) == 0
    printed = capsys.readouterr().out
    assert "beside A and B: modules_to_save, trainable_token_indices: the last adapter's that has it" in printed
    model = PeftModel.from_pretrained(tiny_model("llama"), str(out))
    head = model.get_submodule("base_model.model.lm_head.modules_to_save.default").weight
    assert torch.equal(head, load_file(a / "adapter_model.safetensors")["base_model.model.lm_head.weight"])
    rows = model.get_submodule("base_model.model.model.embed_tokens").token_adapter.trainable_tokens_delta["default"]
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert torch.equal(rows, load_file(b / "adapter_model.safetensors")[key])
    other = llama(tmp_path / "d", 3, trainable_token_indices=[5])
    assert main(["merge", str(b), str(other), "-o", str(tmp_path / "no"), "--union", "--beside", "keep",
                 "--method", "svd"]) == 2  # fmt: skip
    assert "trainable_token_indices is [3, 4], that of" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("how", ["keep", "first", "merge"])
def test_embeddings_that_peft_saved_along(how, tmp_path, capsys):
    """A LoRA on the embedding: PEFT saves the whole base embedding with it, which no field of the config names."""
    targets = ["q_proj", "embed_tokens"]
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        a, b = (llama(tmp_path / str(seed), seed, target_modules=targets) for seed in range(2))
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(b / "adapter_model.safetensors")
    assert key in tensors
    save_file({**tensors, key: tensors[key] + 1}, b / "adapter_model.safetensors")
    words = ["merge", str(a), str(b), "-o", str(tmp_path / "out"), "--method", "svd"]
    assert main(words) == 2
    assert f"holds more than A and B, which are merged: {key} (pass --beside" in capsys.readouterr().err
    assert main([*words, "--beside", how]) == 0
    assert "beside A and B: embeddings: " in capsys.readouterr().out
    one, two, found = (load_file(each / "adapter_model.safetensors")[key] for each in (a, b, tmp_path / "out"))
    expected = {"keep": two, "first": one, "merge": (one.double() + two) / 2}[how]
    assert error_ratio(found, expected) <= 3e-7
    assert main(["interference", str(a), str(b)]) == 0
    assert "not looked at, since it has no B A: embeddings of 0; embeddings of 1" in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "out"))
    assert torch.equal(loaded.get_submodule("base_model.model.model.embed_tokens.base_layer").weight, found)


# --- pickles ---------------------------------------------------------------------------------------------------------


def pickled(folder: Path, to: Path, zipped: bool = True) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "adapter_model.safetensors")
    (to / "adapter_model.safetensors").unlink()
    (to / sums.SUMS).unlink(missing_ok=True)
    torch.save(tensors, to / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    return to


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_tensors_is_read_as_the_safetensors_are(zipped, tiny, tmp_path):
    folders = [make(tiny, tmp_path / str(seed), seed) for seed in range(2)]
    others = [pickled(folder, tmp_path / f"{folder.name} bin", zipped) for folder in folders]
    for method in ("slao", "svd"):
        merge_adapters(folders, tmp_path / method, method)
        merge_adapters(others, tmp_path / f"{method} bin", method)
        one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in (method, f"{method} bin"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


class Trap:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["a call", "no tensors", "a list", "sparse", "int8", "cut", "text"])
def test_other_pickles_are_refused(how, tiny, tmp_path, capsys):
    a = make(tiny, tmp_path / "a", 0)
    b = pickled(a, tmp_path / "b")
    path, trap = b / "adapter_model.bin", tmp_path / "trap"
    tensors = torch.load(path, weights_only=True)
    first = next(iter(tensors))
    content: object = {
        "a call": {**tensors, "x": Trap(trap)},
        "no tensors": {**tensors, "x": 3},
        "a list": list(tensors.values()),
        "sparse": {**tensors, first: tensors[first].to_sparse()},
        "int8": {**tensors, first: tensors[first].to(torch.int8)},
    }.get(how)
    if content is not None:
        torch.save(content, path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.write_text("weights")
    for command in (["merge", "-o", str(tmp_path / "out"), "--method", "svd"], ["interference"]):
        assert main([*command, str(a), str(b)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        message = {
            "no tensors": "holds 'x', which is no dense tensor",
            "a list": "holds no tensors by name",
            "sparse": f"holds {first!r}, which is no dense tensor",
            "int8": "is stored as I8, expected F64, F32, BF16 or F16",
        }.get(how, "is no pickle of tensors alone, and nothing else is unpickled")
        assert message in err
        assert str(path) in err
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
