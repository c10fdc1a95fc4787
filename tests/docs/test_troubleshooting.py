"""The messages that docs/troubleshooting.md explains are messages of the code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _source() -> str:
    """All Python of both packages, with a text that is broken over lines as one."""
    files = [*(ROOT / "slao_kernels").rglob("*.py"), *(ROOT / "python/slao").rglob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted(files))
    return re.sub(r"""(["'])\s*\n\s*f?(?:\1|["'])""", "", text)


def test_every_message_is_one_that_the_code_has():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 50
    source, unknown = _source(), []
    for message in messages:
        pieces = [piece.strip() for piece in message.split("…")]
        pieces = [piece for piece in pieces if len(piece) > 6]
        assert pieces, f"{message}: nothing of it can be looked for"
        unknown += [f"{message}: {piece!r}" for piece in pieces if piece not in source]
    assert unknown == []
