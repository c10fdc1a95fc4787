"""The hub build of lora_linear: a folder that the package `kernels` loads, made of this package's own modules.

    python tools/hub/build.py FOLDER

writes FOLDER/README.md (the card) and FOLDER/build/torch-{cpu,cuda,rocm}: in each the same modules, torch's products
and Triton's and nothing that is compiled beforehand, layers.py (a forward for PEFT's layer) and metadata.json. Nothing
in there imports slao_kernels. FOLDER must be new or empty.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "slao_kernels"
NAME = "slao-lora-linear"
# Of the hub's counting: raised when what a caller sees changes; 0 says that it still may.
VERSION = 0
BACKENDS = ("cpu", "cuda", "rocm")
# What `lora_linear` imports, late imports included. native.py says that there is no compiled core; cpu.py is its user.
MODULES = ("dispatch", "native", "ops/__init__", "ops/checks", "ops/operators", "ops/tables", "ops/tables_device")
OP = "ops/lora_linear"
LEFT_OUT = {"cpu.py"}
INIT = f'''"""{NAME}: a frozen linear layer and its LoRA branch as one node of the autograd graph; see layers.py."""

from . import layers
from .ops.lora_linear import lora_linear

__all__ = ["layers", "lora_linear"]
'''


def modules() -> dict[str, bytes]:
    """Path within a variant -> content, of all but the metadata."""
    found = {"__init__.py": INIT.encode(), "layers.py": (HERE / "layers.py").read_bytes()}
    files = [PACKAGE / f"{name}.py" for name in MODULES]
    files += [file for file in (PACKAGE / OP).glob("*.py") if file.name not in LEFT_OUT]
    files += (PACKAGE / OP / "configs").glob("*.json")
    found |= {file.relative_to(PACKAGE).as_posix(): file.read_bytes() for file in files}
    return dict(sorted(found.items()))


def metadata(backend: str, content: dict[str, bytes]) -> dict[str, object]:
    """What `kernels` asks of a variant. Its id names the module and the operators, so it follows from the content."""
    digests = {name: hashlib.sha256(data).digest() for name, data in content.items()}
    whole = hashlib.sha256(b"".join(name.encode() + digest for name, digest in digests.items())).hexdigest()
    return {
        "id": f"_{NAME.replace('-', '_')}_{backend}_{whole[:12]}",
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def build(folder: Path) -> None:
    """Write the repository. ValueError where something is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: remove it, or name a new folder")
    content = modules()
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        for name, data in content.items():
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            (variant / name).write_bytes(data)
        (variant / "metadata.json").write_text(json.dumps(metadata(backend, content), indent=2) + "\n")
    (folder / "README.md").write_bytes((HERE / "README.md").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description="Assemble the hub build of lora_linear.")
    parser.add_argument("folder", type=Path, help="a new or empty folder for the kernel repository")
    folder = parser.parse_args().folder
    try:
        build(folder)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    print(f"{folder}: {NAME}, version {VERSION}, for {', '.join(BACKENDS)}")


if __name__ == "__main__":
    main()
