"""Sentences of real prose out of the plain text that Sphinx writes (`pydoc_data.topics`).

The layout carries the meaning: blocks are parted by blank lines; a block indented by three under one that ends
in a colon is code, while notes (two) and the bodies of definitions (three, under a signature) are prose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CODE_INDENT = 3  # Sphinx's indent of a literal block relative to the paragraph that introduces it
MIN_WORDS, MAX_WORDS = 6, 60
# Share of letters among the visible characters. At 0.7 lists of operators and signatures fall out, while
# sentences that name a few identifiers stay.
MIN_LETTERS = 0.7

_MARKER = re.compile(r"(?:\*|-|\d+\.|\[\d+\])\s+")
_UNDERLINE = re.compile(r"""\s*([*=\-~^"#])\1{2,}\s*""")
_NOT_PROSE = ("+-", "|", ">>>", "-[", "...")  # tables, doctests, the heading of the footnotes
_VERSION_NOTE = re.compile(
    r"^(?:New|Added|Changed|Deprecated|Removed)(?: since| in)?(?: version)? [\d.]+[^:.]{0,40}:\s+"
)
_FOOTNOTE_MARK = re.compile(r"\s*\[\d+\](?=[\s.,;:)]|$)")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([A-Za-z_][^*]*?)\*{1,2}(?![\w*])")
_SENTENCE_GAP = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?][)"”’]))\s+(?=["“‘'(]*[A-Z]|["“])""")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:e\.g|i\.e|etc|vs|cf|a\.k\.a)\.$", re.IGNORECASE)
_ENDS_UPPER_START = re.compile(r"""["“‘'(]*[A-Z_].*[.!?:]["”’')]*$""")
_ENDS_ANY_START = re.compile(r"""["“‘'(]*\w.*[.!?]["”’')]*$""")


def sentences(text: str) -> list[str]:
    """The prose sentences of `text` in order, each once; empty when it holds none.

    Titles, underlines, tables, code, doctests, grammar productions and signatures are left out; the marks of
    bullets, footnotes, emphasis and version notes are taken off; wrapped lines are joined.
    """
    found = (sentence for block in _prose_blocks(text) for sentence in _split(_join(block)))
    return list(dict.fromkeys(sentence for sentence in found if is_prose(sentence)))


def is_prose(sentence: str) -> bool:
    """Whether `sentence` has 6 to 60 words, is mostly letters, and starts and ends like a sentence."""
    words = sum(any(char.isalpha() for char in word) for word in sentence.split())
    if not MIN_WORDS <= words <= MAX_WORDS or "::=" in sentence:
        return False
    # A colon may end a sentence that introduces code, but after a lower-case start it is a line of code.
    if not (_ENDS_UPPER_START.match(sentence) or _ENDS_ANY_START.match(sentence)):
        return False
    visible = sentence.replace(" ", "")
    return sum(char.isalpha() for char in visible) >= MIN_LETTERS * len(visible)


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of lines between blank lines; a list item starts a block of its own."""
    block: list[str] = []
    for line in text.splitlines():
        if block and (not line.strip() or _MARKER.match(line.lstrip())):
            yield block
            block = []
        if line.strip():
            block.append(line)
    if block:
        yield block


def _prose_blocks(text: str) -> Iterator[list[str]]:
    code_indent: int | None = None  # while inside a literal block: its indent
    introduced: int | None = None  # after a block that ends in a colon: the indent that code would have
    for block in _blocks(text):
        indent = len(block[0]) - len(block[0].lstrip())
        if code_indent is not None and indent >= code_indent:
            continue
        code_indent = indent if indent == introduced else None
        if code_indent is not None:
            introduced = None
            continue
        marker = _MARKER.match(block[0].lstrip())
        body = indent + (marker.end() if marker else 0)
        introduced = body + CODE_INDENT if block[-1].rstrip().endswith(":") else None
        if block[0].lstrip().startswith(_NOT_PROSE) or any(_UNDERLINE.fullmatch(line) for line in block):
            continue
        yield block


def _join(block: list[str]) -> str:
    """One line from wrapped ones, without the marks of lists, footnotes, emphasis and version notes."""
    joined = ""
    for line in map(str.strip, block):
        # The wrapping breaks after the hyphen of a compound word, which takes no space back.
        hyphen = len(joined) > 1 and joined.endswith("-") and joined[-2].isalpha() and line[:1].isalpha()
        joined += line if hyphen or not joined else f" {line}"
    joined = _VERSION_NOTE.sub("", _MARKER.sub("", joined, count=1) if _MARKER.match(joined) else joined)
    return " ".join(_EMPHASIS.sub(r"\1", _FOOTNOTE_MARK.sub("", joined)).split())


def _split(paragraph: str) -> Iterator[str]:
    """Sentences of one paragraph; a full stop of an abbreviation ends none."""
    held = ""
    for piece in _SENTENCE_GAP.split(paragraph):
        held = f"{held} {piece}".strip()
        if not _ABBREVIATION.search(held):
            yield held
            held = ""
    if held:
        yield held
