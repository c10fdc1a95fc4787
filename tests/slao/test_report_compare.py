"""Several runs on one page: what differs, whose methods are whose, and which runs cannot be compared."""

import json

import pytest
from made_results import SEQ, SLAO, Page, entry, two_methods

from slao.cli import main
from slao.report import load_all, table, write_report

RECORD = {"settings": {}, "data": {"task 'yelp', test rows": "aa", "task 'yelp', train rows": "bb"}}


@pytest.fixture
def runs(tmp_path):
    """Two runs, of which the second has another rank, another SLAO, and no SeqLoRA."""
    first, second = two_methods(), two_methods()
    second["settings"]["lora"]["r"] = 16
    second["versions"]["torch"] = "2.12.0"
    lower = [[v - 0.1 for v in row] for row in SLAO]
    second["methods"] = {"slao": entry([lower, SLAO]), "ewc": entry([SEQ, SEQ])}

    def write(**changes):
        for name, results in (("a", first), ("b", second | changes)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "results.json").write_text(json.dumps(results), encoding="utf-8")
            (tmp_path / name / "identity.json").write_text(json.dumps(RECORD), encoding="utf-8")
        return tmp_path / "a", tmp_path / "b"

    return write


def refused(*folders):
    with pytest.raises(ValueError) as caught:
        load_all(folders)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_both_runs_stand_side_by_side(runs, tmp_path):
    page = write_report(*runs())
    assert page == tmp_path / "compare_a_b.html"
    read = Page(page.read_text(encoding="utf-8"))
    headings = [read.text[k] for k, text in enumerate(read.text) if text in ("What differs between the runs", "Scores")]
    assert headings == ["What differs between the runs", "Scores"]
    differs = read.words.partition("What differs between the runs")[2].partition("Scores")[0]
    assert differs.split("setting a b")[1].split() == [
        "lora.r",
        "8",
        "16",
        "version",
        "of",
        "torch",
        "2.11.0",
        "2.12.0",
    ]
    for name in ("slao · a", "seqlora · a", "slao · b", "ewc · b"):
        assert name in read.words
    # SLAO's own other run is what it is held against: AA .733 and .747 against .633 and .733.
    assert "slao · a ends at 0.740 ± 0.009 after 3 tasks, within noise of slao · b (0.057 above)" in read.words
    assert not (tmp_path / "report").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()].count("report") == 0


def test_the_command_takes_several(runs, tmp_path, capsys):
    folders = [str(folder) for folder in runs()]
    assert main(["report", *folders]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'compare_a_b.html'}\n"
    assert main(["report", "--markdown", *folders]) == 0
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "| slao · a", "| seqlora · a", "| slao · b", "| ewc · b"
    ]  # fmt: skip


def test_equal_settings_are_said_to_be(runs):
    same = {key: value for key, value in two_methods().items() if key in ("settings", "versions")}
    assert "Nothing: settings, versions and threads are the same." in write_report(*runs(**same)).read_text()


def test_unfinished_runs_are_named(runs):
    results = load_all(runs(unfinished={"ewc seed 1": [1, 3]}))
    assert table(results).splitlines()[1].startswith("unfinished: ewc seed 1 · b (1 of 3 tasks)")


def test_runs_of_one_name_get_their_parents(runs, tmp_path):
    a, b = runs()
    for name, folder in (("x", a), ("y", b)):
        (tmp_path / name).mkdir()
        folder.rename(tmp_path / name / "demo")
    results = load_all([tmp_path / "x" / "demo", tmp_path / "y" / "demo"])
    assert list(results["runs"]) == ["x/demo", "y/demo"]
    pages = [write_report(tmp_path / one / "demo", tmp_path / other / "demo") for one, other in ("xy", "yx")]
    assert [page.name.rpartition("_")[0] for page in pages] == ["compare_x_demo_y_demo", "compare_y_demo_x_demo"]
    assert [page.parent for page in pages] == [tmp_path / "x", tmp_path / "y"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stream": "trace"}, "the stream is 'python_docs' there and 'trace' here"),
        ({"metric": "Rouge-L"}, "the metric is 'accuracy' there and 'Rouge-L' here"),
        ({"methods": {"slao": entry([[[0.5]]], tasks=[["imdb"]])}},
         "only one of them has the tasks 'agnews', 'dbpedia', 'imdb', 'yelp'"),
        ({"settings": {"train": {"score_on": "validation"}}},
         "train.score_on is 'test' there and 'validation' here, so their scores are of other rows or choices"),
        ({"settings": {"test_rows": 10}}, "test_rows is None there and 10 here"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_named(runs, changes, says):
    assert f"a and b cannot be compared: {says}" in refused(*runs(**changes))


def test_other_test_rows_of_the_same_tasks_are_found(runs):
    """By the checksums of the runs' records; other training rows are what one may want to compare."""
    a, b = runs()
    other = {"data": {"task 'yelp', test rows": "aa", "task 'yelp', train rows": "cc"}}
    (b / "identity.json").write_text(json.dumps(other))
    assert len(load_all([a, b])["methods"]) == 4
    (b / "identity.json").write_text(json.dumps({"data": {"task 'yelp', test rows": "dd"}}))
    assert "the test rows of task 'yelp' are not the same; report on them one by one" in refused(a, b)
    (b / "identity.json").unlink()
    assert len(load_all([a, b])["methods"]) == 4


def test_a_run_against_itself_and_a_broken_one(runs, tmp_path):
    a, b = runs()
    assert refused(a, a) == f"{a} is given twice: a run is compared with other runs"
    (b / "results.json").write_text("{}")
    assert f"{b / 'results.json'}: the results lacks 'stream'" in refused(a, b)
