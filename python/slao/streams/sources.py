"""The fifteen data sets of the classification benchmarks: what their prompts say, and where they stand on the hub.

Instruction lines, label texts and the shape of the texts are those of O-LoRA (arXiv 2310.14152) and its data files
(https://github.com/cmnfriend/O-LoRA), which the later papers share. COPA has its instruction in the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

TOPIC = "What is the topic of the following paragraph? Choose one from the option."
SENTIMENT = "What is the sentiment of the following paragraph? Choose one from the option."
ENTAILMENT = (
    'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the option.'
)
PARAPHRASE = 'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the option.'
SENSE = (
    "Given a word and two sentences, whether the word is used with the same sense in both sentence? "
    "Choose one from the option."
)
BOOLEAN = "According to the following passage, is the question true or false? Choose one from the option."
CANDIDATE = (
    "According to the following passage and question, is the candidate answer true or false? "
    "Choose one from the option."
)
STARS = ("very negative", "negative", "neutral", "positive", "very positive")


@dataclass(frozen=True)
class Source:
    """One data set.

    text: the lines of the prompt, each a text with {columns}. labels: the text of each value of the column `label`,
    of which the first is `first_label`. config: its configuration on the hub. test: the split that tests; GLUE and
    SuperGLUE keep the labels of theirs to themselves, so that the papers test on validation rows.
    """

    hub_id: str
    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    instruction: str
    first_label: int = 0
    config: str | None = None
    test: str = "test"

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that the prompt takes."""
        return tuple(name for line in self.text for name in fields(line))


def fields(line: str) -> tuple[str, ...]:
    """The names in braces of a format string."""
    return tuple(name for _, name, _, _ in Formatter().parse(line) if name)


def _glue(
    config: str,
    text: tuple[str, ...],
    labels: tuple[str, ...],
    instruction: str,
    hub_id: str = "nyu-mll/glue",
    test: str = "validation",
) -> Source:
    return Source(hub_id, text, "label", labels, instruction, config=config, test=test)


def _superglue(config: str, text: tuple[str, ...], labels: tuple[str, ...], instruction: str) -> Source:
    return _glue(config, text, labels, instruction, hub_id="aps/super_glue")


SOURCES: Mapping[str, Source] = {
    "dbpedia": Source(
        "fancyzhx/dbpedia_14",
        ("{title}", "{content}"),
        "label",
        (
            "Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation",
            "Building", "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work",
        ),
        TOPIC,
    ),
    "amazon": Source(
        # The five-star version, as the papers use; "amazon_polarity" has two classes. Stars count from 1.
        "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes",
        ("{review_title}", "{review_text}"),
        "class_index",
        STARS,
        SENTIMENT,
        first_label=1,
    ),
    "yahoo": Source(
        "community-datasets/yahoo_answers_topics",
        ("{question_title}", "{question_content}", "{best_answer}"),
        "topic",
        (
            "Society & Culture", "Science & Mathematics", "Health", "Education & Reference",
            "Computers & Internet", "Sports", "Business & Finance", "Entertainment & Music",
            "Family & Relationships", "Politics & Government",
        ),
        TOPIC,
    ),
    "agnews": Source(
        "fancyzhx/ag_news", ("{text}",), "label", ("World", "Sports", "Business", "Science or Technology"), TOPIC
    ),
    "yelp": Source("Yelp/yelp_review_full", ("{text}",), "label", STARS, SENTIMENT),
    "IMDB": Source("stanfordnlp/imdb", ("{text}",), "label", ("Bad", "Good"), SENTIMENT),
    "SST-2": _glue("sst2", ("{sentence}",), ("Bad", "Good"), SENTIMENT),
    "MNLI": _glue(
        "mnli",
        ("sentence 1: {premise}", "sentence 2: {hypothesis}"),
        ("entailment", "neutral", "contradiction"),
        ENTAILMENT,
        test="validation_matched",
    ),
    "RTE": _glue(
        "rte",
        ("sentence 1: {sentence1}", "sentence 2: {sentence2}"),
        ("entailment", "contradiction"),  # the hub's second one is not_entailment
        ENTAILMENT,
    ),
    "QQP": _glue(
        "qqp", ("first sentence: {question1}", "second sentence: {question2}"), ("False", "True"), PARAPHRASE
    ),
    "CB": _superglue(
        "cb",
        ("sentence 1: {premise}", "sentence 2: {hypothesis}"),
        ("entailment", "contradiction", "neutral"),
        ENTAILMENT,
    ),
    "WiC": _superglue("wic", ("word: {word}", "{sentence1}", "{sentence2}"), ("False", "True"), SENSE),
    "COPA": _superglue(
        "copa",
        (
            'Which sentence is the {question} of "{premise}"? Choose one between A and B.',
            "A: {choice1}",
            "B: {choice2}",
        ),
        ("A", "B"),
        "",
    ),
    "BoolQA": _superglue("boolq", ("question: {question}", "passage: {passage}"), ("False", "True"), BOOLEAN),
    "MultiRC": _superglue(
        "multirc",
        ("paragraph: {paragraph}", "question: {question}", "candidate answer: {answer}"),
        ("False", "True"),
        CANDIDATE,
    ),
}  # fmt: skip
