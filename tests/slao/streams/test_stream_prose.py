"""The plain text of Sphinx, piece by piece: what is prose stays, what is code goes."""

import pytest

from slao.streams.prose import is_prose, sentences

TEXT = """The "sample" statement
**********************

   sample_stmt ::= "sample" expression ["as" target]

The *sample* statement draws one value from a **large** and well-
formed collection of values, e.g. "x" or y.  "x in s" is never evaluated for it at all.  [1]  The last
sentence of this paragraph introduces a block:

   for value in sample:
       # This comment is a sentence of code and must not be taken as prose.
       print(value)

   The block goes on after an empty line and is still code here.

Changed in version 3.8: The statement now accepts any number of targets.

* A list item is a sentence as well, and it wraps over
  two lines before it ends.

* Short item.

object.sample(self, *args)

   Called when the statement runs; the body of a definition is prose.

      >>> This doctest line looks like a sentence of prose.

Note:

  Notes are indented by two columns and are therefore kept as prose.

+---------+------------------------------------------------+
| Table   | Cells of a table are not sentences of the text. |
+---------+------------------------------------------------+

-[ Footnotes ]-

[1] A footnote is prose that keeps its words and loses its mark.
"""


def test_sentences_of_each_kind_of_block():
    assert sentences(TEXT) == [
        'The sample statement draws one value from a large and well-formed collection of values, e.g. "x" or y.',
        '"x in s" is never evaluated for it at all.',
        "The last sentence of this paragraph introduces a block:",
        "The statement now accepts any number of targets.",
        "A list item is a sentence as well, and it wraps over two lines before it ends.",
        "Called when the statement runs; the body of a definition is prose.",
        "Notes are indented by two columns and are therefore kept as prose.",
        "A footnote is prose that keeps its words and loses its mark.",
    ]


def test_a_sentence_counts_once():
    assert sentences("Every sentence of a topic is counted once. " * 3) == [
        "Every sentence of a topic is counted once."
    ]


@pytest.mark.parametrize("text", ["", "\n\n", "Title\n*****\n"])
def test_nothing_to_take(text):
    assert sentences(text) == []


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("This sentence has exactly six words.", True),
        ("This one has only five.", False),
        ("One " + " ".join(["word"] * 58) + " ends.", True),
        ("One " + " ".join(["word"] * 59) + " ends.", False),
        ("No full stop stands at the end of it", False),
        ("encoding is a name and may start a sentence.", True),
        ("for value in all of the values:", False),
        ("x.a(b)[0] += {1: 2} - f(**g, *h) | (i & j) and nothing else here.", False),
    ],
)
def test_is_prose(sentence, expected):
    assert is_prose(sentence) is expected
