"""What settings say, whatever their section: numbers are numbers, names are known, keys stand once."""

from __future__ import annotations

from typing import Any

import pytest

from slao import settings
from slao.reading import parse_yaml


def completed(text: str) -> dict[str, Any]:
    content = parse_yaml(text, "study.yaml")
    return settings.complete(content)


# YAML 1.1 reads all of these as texts.
NUMBERS = {
    "train: {learning_rate: 1e-4}": ("train.learning_rate", 1e-4),
    "train: {arguments: {adam_epsilon: 1e-8}}": ("train.arguments.adam_epsilon", 1e-8),
    "train: {arguments: {neftune_noise_alpha: 1e1}}": ("train.arguments.neftune_noise_alpha", 10.0),
    "stream: {name: jsonl, path: x, validation_fraction: 1e-1}": ("stream.validation_fraction", 0.1),
    "objective: {name: label_matching, temperature: 5e-2}": ("objective.temperature", 0.05),
    "objective: {temperature: 5e-2}": ("objective.temperature", 0.05),
    "methods: {ewc: {weight: 1e2}}": ("methods.ewc.weight", 100.0),
    "methods: {slao: {schedule: 5e-1}}": ("methods.slao.schedule", 0.5),
    "methods: {clora: {delta_std: 1e-3, b_std: 1e-2}}": ("methods.clora.b_std", 0.01),
    "methods: {mine: {method: olora, learning_rate: 1e-3}}": ("methods.mine.learning_rate", 1e-3),
    "lora: {lora_alpha: 1e1}": ("lora.lora_alpha", 10.0),
    "train_fraction: 1e-1": ("train_fraction", 0.1),
}


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_where_one_is_expected(text):
    key, value = NUMBERS[text]
    found: Any = completed(text)
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert isinstance(found, float)


def test_texts_stay_texts():
    found = completed("name: 1e3\nmethods: {'1e3': {method: slao, schedule: inverse}, no: {method: ewc}}")
    assert found["name"] == "1e3"
    assert list(found["methods"]) == ["1e3", "no"]
    assert completed("name: 2024-01-01")["name"] == "2024-01-01"


BAD = {
    "methods:\n  slao: {schedule: inv_sqrt}\n  slao: {schedule: inverse}": "line 3: the key 'slao' stands twice",
    "seeds: [0]\nseeds: [1]": "line 2: the key 'seeds' stands twice",
    "train: {max_steps: 1, max_steps: 2}": "line 1: the key 'max_steps' stands twice",
    "methods: {'': {}}": "line 1: a key is empty",
    "? \n: 3": "line 1: a key is empty",
    "[a, b]: 3": "a key is a list or a mapping",
    "a: &a [*a]": "contains itself",
    "x: !!python/object/apply:os.system [ls]": "could not determine a constructor",
    "": "must be a mapping of settings, not an empty file",
    'name: "\\ud83d"': "half of a character (\\ud83d",
    "1: 2": "unknown setting '1'",
    "train: {arguments: {adam_epsilon: tiny}}": "train.arguments.adam_epsilon must be a number, not 'tiny'",
    "train: {arguments: {warmup_step: 3}}": "train.arguments has no option 'warmup_step'; similar ones are",
    "train: {arguments: {logging_first_step: 'yes'}}": "logging_first_step must be true or false, not 'yes'",
    "train: {arguments: {eval_steps: 3}}": "train.arguments.eval_steps would do nothing: scores come",
    "train: {arguments: {save_steps: 3}}": "train.arguments.save_steps would do nothing: the whole state is saved",
    "train: {arguments: {auto_find_batch_size: true}}": "auto_find_batch_size would do nothing: it starts the training",
    "train: {learning_rate: .nan}": "train.learning_rate must be a finite number, not nan",
    "train: {learning_rate: -1}": "train.learning_rate must be at least 0, not -1",
    "train: {weight_decay: .inf}": "train.weight_decay must be a finite number, not inf",
    "train: {arguments: {max_grad_norm: 1e999}}": "train.arguments.max_grad_norm must be a finite number, not inf",
    "methods: {ewc: {learning_rate: -1}}": "methods.ewc.learning_rate must be at least 0, not -1",
    "methods: {ewc: {weight: .nan}}": "methods.ewc.weight must be a finite number, not nan",
    "methods: {ewc: {name: x}}": "method 'ewc' has no option 'name'; its options are weight, decay, beside, method",
    "methods: {ewc: {adapter: x}}": "method 'ewc' has no option 'adapter'",
    "methods: {ewc: 0}": "setting 'methods.ewc' must be a section, not 0",
    "methods: [slao, slao]": "methods names 'slao' twice",
    "methods: [[slao]]": "methods must name at least one of",
    "methods: {a: {method: [slao]}}": "methods.a.method must be a text, not ['slao']",
    "stream: {name: [jsonl]}": "stream.name must be a text, not ['jsonl']",
    "stream: {name: jsonl, path: 3}": "stream.path must be a text, not 3",
    "stream: {name: jsonl, path: x, order: [1]}": "stream.order[0] must be a text, not 1",
    "stream: {name: clinc150, load: x}": "stream 'clinc150' has no option 'load'",
    "objective: {name: {a: 1}}": "objective.name must be a text",
    "objective: {max_length: 12.5}": "objective.max_length must be a whole number, not 12.5",
    "backend: [auto]": "backend must be a text, not ['auto']",
    "seeds: [true]": "seeds[0] must be a whole number, not True",
    "seeds: [123456789]": "seeds must be whole numbers from 0 to 400000",
    "lora: {lora_alpha: 0}": "lora.lora_alpha must be above 0, not 0",
    "lora: {lora_dropout: 1}": "lora.lora_dropout must lie in [0, 1), not 1",
    "lora: {inference_mode: true}": "lora.inference_mode would freeze the adapter",
    "lora: {target_modules: [1]}": "lora.target_modules[0] must be a text, not 1",
    "lora: {rank_pattern: [1]}": "lora.rank_pattern must be a section, not [1]",
    "sweep: [1]": "setting 'sweep' must be a section, not [1]",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_one_line_that_names_the_setting(text):
    with pytest.raises(ValueError) as caught:
        settings.complete(settings._parse(text, "study.yaml"))
    assert BAD[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_merge_keys_are_no_duplicates():
    found = completed("methods:\n  a: &a {method: slao, init: merged}\n  b: {<<: *a, init: random}")
    assert found["methods"]["b"] == {"method": "slao", "init": "random"}


def test_presets_pass():
    for name in settings.presets():
        settings.complete(settings.load_preset(name))


@pytest.mark.parametrize("key", ["", "train.", ".x", "a..b"])
def test_an_empty_part_of_a_key(key):
    with pytest.raises(ValueError, match="is empty"):
        settings.assign({}, key, 1)
