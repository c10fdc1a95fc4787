"""The base that adapters are folded into: its weights, and the config beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...reading import inside, read_json
from ..weights import Weights, scheme


class Base(Weights):
    """A folder with a model as transformers saves it. Raises ValueError for what `Weights` does, and where there is no
    config.json, or a quantised model."""

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        if not path.is_dir():
            raise ValueError(f"{folder} is no folder: download the base first, and name the folder that it lies in")
        if not (path / "config.json").exists():
            raise ValueError(f"{path} holds no model: there is no config.json")
        self.config: dict[str, Any] = read_json(inside(path / "config.json", path))
        if not isinstance(self.config, dict):
            raise ValueError(f"{path / 'config.json'} does not describe a model")
        if (how := scheme(self.config)) is not None:
            raise ValueError(
                f"{path} is quantised ({how}), and a delta cannot be added to such weights: fold into the checkpoint "
                "that was quantised, or load it, call model.dequantize(), and fold into what save_pretrained writes"
            )
        super().__init__(path)
