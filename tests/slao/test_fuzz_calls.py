"""Random sequences of calls on a patched model with a method, beside a plain PEFT twin.

After every call the two agree: same outputs, same gradients, or both raise. What a method shows and exports is compared
with its definition in fp64, and what it refuses with what it has to refuse. C-LoRA's gradients, which PEFT has not, are
in tests/slao_kernels/ops/test_fuzz_ops.py. 670 sequences a method, the same at every run; SLAO_FUZZ=2000 makes two
thousand, others every time (`make fuzz`).
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_twins import ALL, CLOSE, PEFTS, Pairs, adapters, close, gradients, layers_of, outputs, plain, put
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import slao_kernels
from slao.methods import make_method

EXAMPLES = int(os.environ.get("SLAO_FUZZ", "670"))


class Twins:
    """model and its method; twin, plain PEFT; merged: B A of SLAO's merge, or what IncLoRA has frozen, in fp64."""

    def __init__(self, name: str, folder: Path, patched: bool) -> None:
        self.model, self.twin, self.folder, self.name = plain(), plain(), folder, name
        if patched:
            slao_kernels.patch(self.model)
        self.method = make_method(name, self.model)
        self.begun = self.ended = 0
        self.merged: dict[str, tuple[Tensor | None, Tensor]] = {}  # SLAO: A None where the trained one is it
        self.saved: dict[str, Any] | None = None
        self.worst = CLOSE[torch.float32]  # of all dtypes that the numbers have been in
        self.done = Counter[str]()
        put(self.twin, adapters(self.model))

    def run(self, call: str) -> None:
        if call in PEFTS:
            self._both(call)
        elif call == "step":
            self._step()
        elif call == "copy":  # as PEFT's models are copied; the method stays with the one it has
            self.compare(copy.deepcopy(self.model), self.model)
        else:
            self._ours(call)
        self.worst = max(self.worst, self.tolerance())
        self._level()
        self.compare(self.model, self.twin)

    def _level(self) -> None:
        """Equal weights; from here on bitwise: what was rounded otherwise (in merging, or B times C-LoRA's core) must
        not add up."""
        for layer, twin in zip(layers_of(self.model).values(), layers_of(self.twin).values(), strict=True):
            weight, exact = layer.base_layer.weight, twin.base_layer.weight
            assert weight.dtype == exact.dtype
            close(weight.detach(), exact.detach(), self.worst)
            exact.data = weight.detach().clone()
        found, expected = adapters(self.model), adapters(self.twin)
        assert found.keys() == expected.keys()
        for key, two in expected.items():
            for factor, exact in zip(found[key], two, strict=True):
                assert factor.dtype == exact.dtype
                close(factor, exact, self.worst)
        put(self.twin, found)

    def tolerance(self) -> float:
        return max(CLOSE[p.dtype] for p in self.model.parameters())

    def compare(self, model: Any, twin: Any, tolerance: float | None = None) -> None:
        y, exact = outputs(model), outputs(twin)
        if not isinstance(exact, Tensor):
            assert y is exact
            return
        assert isinstance(y, Tensor), y
        assert y.dtype == exact.dtype
        close(y, exact, tolerance or self.tolerance())

    def _both(self, call: str) -> None:
        errors: list[Any] = []
        for model in (self.model, self.twin):
            try:
                PEFTS[call](model)
                errors.append(None)
            except Exception as error:
                errors.append(type(error))
        assert errors[0] is errors[1], f"{call}: {errors}"
        self.done["raised" if errors[0] else "worked"] += 1
        if call in ("to bf16", "half", "float", "double"):
            self._check_refusal()

    def _check_refusal(self) -> None:
        """A base that was rounded while it was merged cannot come back: refused, until the model is unpatched."""
        for layer in layers_of(self.model).values():
            if "slao_kept" in layer.__dict__:
                try:
                    copy.deepcopy(layer).unmerge()
                except ValueError as error:
                    if "has changed since" not in str(error):
                        raise
                    slao_kernels.unpatch(self.model)
                    self.done["unpatched"] += 1

    def _step(self) -> None:
        """Equal gradients, then one step; after it the twin starts from the very numbers of the model."""
        found, expected = gradients(self.model), gradients(self.twin)
        if not (self.name == "clora" and isinstance(found, dict) and any("slao" in name for name in found)):
            if not isinstance(expected, dict):
                assert found is expected
                return
            assert found.keys() == expected.keys()
            size = torch.cat([g.double().flatten() for g in expected.values()]).square().mean().sqrt()
            for name, g in expected.items():  # of a stack the first pair trains
                own = g[: found[name].shape[0], : found[name].shape[1]]
                close(found[name], own, self.tolerance(), size)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.02 * parameter.grad
        put(self.twin, adapters(self.model))
        self.done["worked"] += 1

    def _ours(self, call: str) -> None:
        able = all(self._able(call, layer) for layer in layers_of(self.model).values())
        before, old = adapters(self.model), self._deltas()
        refusal: ValueError | None = None
        try:
            self._ask(call)
        except ValueError as error:
            refusal = error
        if refusal is not None:
            assert len(str(refusal).splitlines()) == 1
            assert not able, f"{call}: {refusal}"
            self._check_same(before)
            self.done["refused"] += 1
            return
        assert able, f"{call} was not refused"
        if call == "begin":
            self._began(before, old)
        elif call == "end":
            self._ended(before)
        if call == "load" and self.saved is not None:
            before, self.merged, self.begun, self.ended = (
                self.saved[key] for key in ("adapters", "merged", "begun", "ended")
            )
        if call != "begin" or self.name == "clora" or self.begun == 1:
            self._check_same(before)
        assert (self.method.task, len(self.method.lambdas)) == (self.begun, self.ended)
        put(self.twin, adapters(self.model))
        if call == "end":
            self._ask("merged")
        self.done["answered"] += 1

    def _able(self, call: str, layer: Any) -> bool:
        """Whether the layer is in a state for it (docs/adapter_parts.md)."""
        if call in ("patch", "unpatch"):
            return True
        there = "default" in layer.lora_A
        if call in ("save", "export") or not there:
            return there
        if call == "load":
            return self.saved is not None and self.saved["dtypes"] == self._dtypes() and not layer.merged_adapters
        runs = not layer.merged_adapters and not layer.disable_adapters and "default" in layer.active_adapters
        return runs and (call == "merged" or (self.begun > self.ended) == (call == "end"))

    def _ask(self, call: str) -> None:
        if call == "patch":
            slao_kernels.patch(self.model)
        elif call == "unpatch":
            slao_kernels.unpatch(self.model)
        elif call == "begin":
            self.method.begin_task(str(self.begun))
        elif call == "end":
            self.method.end_task()
        elif call == "merged":
            with self.method.merged():
                twin = copy.deepcopy(self.twin)
                for name, layer in layers_of(twin).items():
                    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                    A.data, B.data = torch.eye(A.shape[1]).to(A), (self._shown()[name] / 5 * 3).to(B)
                self.compare(self.model, twin, self.worst)
        elif call == "export":
            self.method.save_pretrained(self.folder / "export")
            self._check_export()
        elif call == "save":
            self.method.save(self.folder / "state")
            self.saved = {"adapters": adapters(self.model), "merged": dict(self.merged), "dtypes": self._dtypes()}
            self.saved |= {"begun": self.begun, "ended": self.ended}
        else:
            self.method.load(self.folder / "state")

    def _dtypes(self) -> list[torch.dtype]:
        return [p.dtype for name, p in self.model.named_parameters() if "default" in name or "slao" in name]

    def _check_same(self, before: Pairs) -> None:
        now = adapters(self.model)
        assert now.keys() >= before.keys()
        assert all(torch.equal(*two) for key in before for two in zip(now[key], before[key], strict=True))

    def _deltas(self) -> dict[str, Tensor]:
        """s B A of the adapter as trained, with what a method has added to it, in fp64."""
        found = adapters(self.model).items()
        return {name: 5 / 3 * B.double() @ A.double() for (name, adapter), (A, B) in found if adapter == "default"}

    def _shown(self) -> dict[str, Tensor]:
        """s B A of what the finished tasks have left, by the method's definition."""
        live = self._deltas()
        if self.name == "slao":
            As = {name: A.double() for (name, adapter), (A, _) in adapters(self.model).items() if adapter == "default"}
            return live | {name: 5 / 3 * B @ (As[name] if A is None else A) for name, (A, B) in self.merged.items()}
        if self.name == "inclora" and self.begun > self.ended:
            return {name: B for name, (_, B) in self.merged.items()}
        return live

    def _began(self, before: Pairs, old: dict[str, Tensor]) -> None:
        self.begun += 1
        for name, layer in layers_of(self.model).items():
            A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            if self.name == "inclora":
                self.merged[name] = None, old[name] * (self.begun > 1)
                if self.begun > 1:
                    assert not B.any()
                    close(self._deltas()[name], old[name], self.tolerance())
            if self.name == "slao" and self.begun > 1:
                A_old, B_old = before[name, "default"]
                assert torch.equal(B, B_old)
                self.merged[name] = A_old.double(), self.merged[name][1]
                Q, R = torch.linalg.qr(A_old.double().T)
                close(A, (Q * R.diagonal().sign()).T, self.tolerance() * float(torch.linalg.cond(R)))

    def _ended(self, before: Pairs) -> None:
        self.ended += 1
        if self.name == "slao":
            lam = self.ended**-0.5
            assert self.method.lambdas[-1] == pytest.approx(lam)
            for name in layers_of(self.model):
                B = before[name, "default"][1].double()
                old = self.merged[name][1] if self.ended > 1 else B
                self.merged[name] = None, old + lam * (B - old)

    def _check_export(self) -> None:
        tensors = load_file(self.folder / "export" / "adapter_model.safetensors")
        saved = json.loads((self.folder / "export" / "adapter_config.json").read_text())
        for name, exact in self._shown().items():
            A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
            scaling = saved["lora_alpha"] / saved["r"]
            close(scaling * B @ A, exact, self.worst, 1 + exact.square().mean().sqrt())


@pytest.mark.parametrize(
    "name", ["slao", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("clora", "inclora"))]
)
def test_any_sequence_of_calls(name, tmp_path):
    done: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="SLAO_FUZZ" not in os.environ,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(st.booleans(), st.lists(st.sampled_from(ALL), min_size=4, max_size=14))
    def run(patched: bool, calls: list[str]) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            twins = Twins(name, Path(folder), patched)
            for call in calls:
                twins.run(call)
        done.update(twins.done)
        done["sequences"] += 1

    run()
    assert min(done[kind] for kind in ("worked", "raised", "answered", "refused")) >= done["sequences"] / 5, done
