"""The state of PEFT's layers is asked before A and B are read, written or shown; the base weights stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import slao_kernels
from slao import make_method
from slao.methods import METHODS
from slao_kernels import weighted_merge

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(9))


def make(name: str = "slao", tasks: int = 2, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0", "2"])
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), config)
    model.add_adapter("second", config)
    slao_kernels.patch(model)
    method = make_method(name, model, **options)
    for task in range(tasks):
        begin(method, str(task))
        train(method, task)
        end(method)
    return method


def begin(method, name: str) -> None:
    method.observe([])
    if method.observes:
        method._grams = [torch.eye(16, dtype=torch.float64) for _ in method.pairs]
    method.begin_task(name)


def end(method) -> None:
    if method.observes:
        method._grams = [torch.eye(16, dtype=torch.float64) for _ in method.pairs]
    method.end_task()


def train(method, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)


def base(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "base_layer" in name]).clone()


def merge(method, tmp_path):
    method.model.merge_adapter()


def inactive(method, tmp_path):
    method.model.set_adapter("second")


def disabled(method, tmp_path):
    method.model.base_model.disable_adapter_layers()


def on_meta(method, tmp_path):
    for pair in method.pairs:
        pair.layer.lora_A.to("meta")


def deleted(method, tmp_path):
    method.model.delete_adapter("default")


def merged_for_good(method, tmp_path):
    method.model.merge_and_unload()


def shown(method, folder):
    with method.merged():
        pass


OPERATIONS = {
    "begin_task": lambda method, folder: method.begin_task("next"),
    "end_task": lambda method, folder: method.end_task(),
    "merged": shown,
    "load": lambda method, folder: method.load(folder),
    "save": lambda method, folder: method.save(folder / "again"),
    "save_pretrained": lambda method, folder: method.save_pretrained(folder / "out"),
}
READS = ("save", "save_pretrained")
# state -> (how it comes about, the refusal, the operations that it does not concern)
STATES = {
    "merged": (merge, r"are merged into the base: call unmerge_adapter\(\)", READS),
    "inactive": (inactive, r"'default' is not active.*: call set_adapter\('default'\)", (*READS, "load")),
    "disabled": (disabled, "adapters are disabled", (*READS, "load")),
    "meta": (on_meta, "are on the meta device", ()),
    "deleted": (deleted, "adapter 'default' was deleted", ()),
    "merge_and_unload": (merged_for_good, "no longer in the model", ()),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("state", STATES)
def test_an_operation_that_would_be_wrong_refuses(state, operation, tmp_path):
    bring, message, fine = STATES[state]
    method = make()
    method.save(tmp_path)
    if operation == "end_task":
        method.begin_task("running")
    bring(method, tmp_path)
    names = list(method.names)
    if operation in fine:
        OPERATIONS[operation](method, tmp_path)
        return
    with pytest.raises(ValueError, match=message) as caught:
        OPERATIONS[operation](method, tmp_path)
    assert f"{operation}(): base_model.model.0: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert method.names == names
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_merging_by_peft_never_changes_the_base_for_good(name, caplog):
    """Before a task it is refused; within merged() it is taken out again with the weights that were merged."""
    method = make(name)
    before = base(method.model)
    method.model.merge_adapter()
    with pytest.raises(ValueError, match="are merged into the base"):
        begin(method, "third")
    method.model.unmerge_adapter()
    assert (base(method.model) - before).abs().max() <= 1e-6
    with torch.no_grad(), method.merged():
        expected = method.model(X)
        method.model.merge_adapter()
        assert (method.model(X) - expected).abs().max() <= 1e-5
    assert "merge_adapter() inside merged()" in caplog.text
    assert (base(method.model) - before).abs().max() <= 1e-6
    with torch.no_grad(), method.merged():
        assert (method.model(X) - expected).abs().max() <= 1e-5


def test_merge_and_unload_inside_merged_keeps_the_merge():
    method = make()
    with torch.no_grad():
        with method.merged():
            expected = method.model(X)
            plain = method.model.merge_and_unload()
        assert (plain(X) - expected).abs().max() <= 1e-5


def test_a_model_with_gradients_shows_the_merge_compiled_and_not():
    """OPCM's merge has another rank than the gradients of the last step."""
    method = make("opcm")
    gradients = [torch.ones_like(p) for pair in method.pairs for p in pair.parameters]
    parameters = [p for pair in method.pairs for p in pair.parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    with method.merged():
        assert all(parameter.grad is None for parameter in parameters)
        assert parameters[0].shape[0] == 8
    assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("name", ["clora", "inclora", "olora", "sdlora"])
def test_what_a_method_adds_to_a_layer_is_in_no_file_of_pefts(name, tmp_path):
    from safetensors.torch import load_file

    method = make(name)
    with torch.no_grad():
        expected = method.model(X)
        method.save_pretrained(tmp_path / "export")
        with method.merged():
            method.model.save_pretrained(str(tmp_path / "theirs"))
        for folder in ("export", "theirs", "theirs/second"):
            keys = load_file(tmp_path / folder / "adapter_model.safetensors")
            assert {key.rsplit(".", 2)[1] for key in keys} == {"lora_A", "lora_B"}
        method.model.load_adapter(str(tmp_path / "export"), "earlier")
        method.model.set_adapter("default")
        assert torch.equal(method.model(X), expected)
        again = copy.deepcopy(method.model)  # a state dict holds neither more nor less of the layer
        again.load_state_dict(method.model.state_dict())
        assert torch.equal(again(X), expected)
    begin(method, "next")
    trains = [p for layer in method.layers for n, p in layer.named_parameters() if n.startswith("slao_")]
    assert all(parameter.requires_grad for parameter in trains)


@pytest.mark.parametrize("name", ["slao", "clora", "inclora", "sdlora"])
def test_weighted_merge_by_name_takes_all_that_the_adapter_adds(name):
    method = make(name)
    merge = weighted_merge(["default"], [1.0], rank=8, model=method.model)
    for (A, B), pair in zip(merge.pairs, method.pairs, strict=True):
        delta = pair.layer.get_delta_weight("default").detach()
        assert float((B @ A - delta).norm() / delta.norm()) <= 1e-5


def test_weighted_merge_by_name_refuses_what_is_on_meta():
    method = make()
    on_meta(method, None)
    with pytest.raises(ValueError, match="are on the meta device"):
        weighted_merge(["default"], [1.0], model=method.model)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_peft_freezes_the_adapter(name, caplog):
    """Before a task it would train nothing; in the midst of one what it was until then is merged."""
    method = make(name, tasks=1)
    method.model.set_requires_grad("default", False)
    before = base(method.model), [pair.A.clone() for pair in method.pairs]
    with pytest.raises(ValueError, match=r"begin_task\(\): no A or B of adapter 'default' requires a gradient"):
        begin(method, "frozen")
    assert torch.equal(base(method.model), before[0])
    assert all(torch.equal(pair.A, A) for pair, A in zip(method.pairs, before[1], strict=True))
    method.model.set_requires_grad("default", True)
    begin(method, "thawed")
    train(method, 3)
    trained = [pair.B.clone() for pair in method.pairs]
    method.model.set_requires_grad("default", False)
    caplog.clear()
    end(method)
    assert "adapter 'default' was frozen while the task ran: what it was then is merged" in caplog.text
    assert method.names == ["0", "thawed"]
    assert len(method.lambdas) == 2
    if name not in ("magmax", "osf", "slora"):  # which make something else of what was trained
        assert all(torch.equal(pair.B, B) for pair, B in zip(method.pairs, trained, strict=True))


def test_a_task_looks_over_the_whole_model_once(monkeypatch):
    """A large model has thousands of modules: to begin a task finds what trains beside A and B, by one walk over them;
    to end one, and to ask for the layers' state, takes none."""
    method, walks = make(tasks=1), []
    usual = nn.Module.named_modules

    def counted(self, *given, **options):
        if self is method.model:
            walks.append(1)
        return usual(self, *given, **options)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    begin(method, "next")
    assert len(walks) == 1
    end(method)
    shown(method, None)
    assert len(walks) == 1
