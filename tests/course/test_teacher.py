"""The teacher's path: five made-up submissions in five shapes become a table, a report and Gradescope's JSON."""

import csv
import json
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from minift.course import registry
from minift.course.class_page import class_page
from minift.course.class_report import examine, shape_of
from minift.course.cli import cli
from minift.course.cli_teacher import chosen
from minift.course.collect import collect, student_of
from minift.course.marks import read_weights

EXERCISES = registry.all_exercises()
E01, E20 = EXERCISES["e01"], EXERCISES["e20"]
SOLUTION = E01.text("solution.py")
TRUNCATES = next(one for one in E01.mutants if one.name == "truncates").source(SOLUTION)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(one) for one in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value or 0, result.output


@pytest.fixture(scope="module")
def submissions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alice: a folder, all right. bob: a zip, truncates. carol: Canvas, ends its process. dan: Moodle. eve: empty."""
    folder = tmp_path_factory.mktemp("submissions")
    (folder / "alice").mkdir()
    (folder / "alice" / "e01_absmax.py").write_text(SOLUTION)
    (folder / "alice" / "e20_lora_by_hand.py").write_text(E20.text("solution.py"))
    (folder / "alice" / "solutions").mkdir()
    (folder / "alice" / "solutions" / "e20_lora_by_hand.py").write_text("raise SystemExit\n")
    with zipfile.ZipFile(folder / "bob.zip", "w") as archive:
        archive.writestr("my-course/e01_absmax.py", TRUNCATES)
        archive.writestr("my-course/e20_lora_by_hand.py", "import os\nos._exit(0)\ndef forward(): pass\n")
        archive.writestr("../../e23_adamw.py", "class AdamW: pass\n")
        archive.writestr("my-course/manifest.json", '{"exercises": {"e01": {"hints": 2}}}')
    (folder / "carol_LATE_123_456_e01_absmax.py").write_text("import os\n" + SOLUTION + "\nos._exit(0)\n")
    moodle = folder / "Dan Doe_991_assignsubmission_file_"
    moodle.mkdir()
    renamed = TRUNCATES.replace("magnitude", "m").replace("absmax", "a").replace('"""e01', '"""mine')
    (moodle / "E01.py").write_text(renamed)
    (folder / "eve").mkdir()
    (folder / "broken.zip").write_bytes(b"PK nothing")
    return folder


@pytest.fixture(scope="module")
def graded(submissions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    status, _ = run(
        "grade",
        submissions,
        "--csv",
        out / "grades.csv",
        "--json",
        out / "records",
        "--jobs",
        2,
        "--exercises",
        "e01,e20",
    )
    assert status == 0
    return out


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


def test_names_of_platforms_are_understood():
    assert student_of("doejane_LATE_123_456_e01_absmax") == "doejane"
    assert student_of("doejane_123_456_submission") == "doejane"
    assert student_of("Jane van Doe_9_assignsubmission_file_") == "Jane van Doe"
    assert student_of("anna_maria") == "anna_maria"


def test_everybody_is_found(submissions: Path):
    found = {one.student: set(one.files) for one in collect(submissions, list(EXERCISES.values()))}
    assert found == {
        "Dan Doe": {"e01"}, "alice": {"e01", "e20"}, "bob": {"e01", "e20", "e23"}, "broken": set(),
        "carol": {"e01"}, "eve": set(),
    }  # fmt: skip


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="has no submissions"):
        list(collect(tmp_path, [E01]))


def test_grades(graded: Path):
    rows = rows_of(graded / "grades.csv")
    assert next(iter(rows)) == "(maximum)" and rows["(maximum)"]["total"] == str(E01.points + E20.points)
    assert {name: row["total"] for name, row in rows.items() if name != "(maximum)"} == {
        "Dan Doe": "0", "alice": "9", "bob": "0", "broken": "0", "carol": "0", "eve": "0",
    }  # fmt: skip
    assert {name: row["e01 status"] for name, row in rows.items()} == {
        "(maximum)": "pass", "Dan Doe": "fail", "alice": "pass", "bob": "fail", "broken": "not_started",
        "carol": "crash", "eve": "not_started",
    }  # fmt: skip
    assert rows["bob"]["e01 misconception"] == rows["Dan Doe"]["e01 misconception"] == "truncates"
    assert rows["bob"]["e20 status"] == "crash"
    assert rows["alice"]["e20 passed"] == f"{len(E20.checks)}/{len(E20.checks)}"


def test_weights_change_the_totals_only(submissions: Path, graded: Path, tmp_path: Path):
    (tmp_path / "weights.toml").write_text("e01 = 2.75\ne20 = 0  # not this year\n")
    arguments = ("--csv", tmp_path / "grades.csv", "--json", graded / "records", "--exercises", "e01,e20")
    said = run("grade", submissions, *arguments, "--weights", tmp_path / "weights.toml")[1]
    rows, before = rows_of(tmp_path / "grades.csv"), rows_of(graded / "grades.csv")
    assert rows["alice"]["total"] == rows["(maximum)"]["total"] == str(2.75 * E01.points) == "8.25"
    assert "8.25 of 8.25\n" in said
    for name, row in rows.items():
        assert {**before[name], "total": "", "max": ""} == {**row, "total": "", "max": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e01: 2", "weights.toml is not TOML"),
        ("e21 = 2", "weighs e21, which is not among"),
        ("e01 = -1", "e01 = -1; a weight is a number from 0 on"),
        ("e01 = nan", "e01 = nan; a weight"),
        ("e01 = true", "e01 = True; a weight"),
    ],
)
def test_weights_that_make_no_sense(tmp_path: Path, text: str, message: str):
    (tmp_path / "weights.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "weights.toml", [E01, E20])


def test_grading_goes_on_where_it_stopped(submissions: Path, graded: Path, monkeypatch):
    """Nothing is graded a second time: with no judge to ask, the same table comes out."""
    before = (graded / "grades.csv").read_bytes()
    (graded / "grades.csv").unlink()

    def never(*arguments):
        raise AssertionError("graded again")

    monkeypatch.setattr("minift.course.marks.grade_submission", never)
    options = ["--csv", graded / "grades.csv", "--json", graded / "records", "--exercises", "e01,e20"]
    run("grade", submissions, *options)
    assert (graded / "grades.csv").read_bytes() == before
    with pytest.raises(AssertionError, match="graded again"):
        run("grade", submissions, *options, "--seeds", 3)


def test_report_counts_mistakes_and_finds_copies(graded: Path):
    said = run("report", graded / "records")[1]
    assert "6 submissions" in said
    assert "2 x  truncates" in said
    assert "e01: Dan Doe, bob" in said  # the same but for names


class Page(HTMLParser):
    """The tags, and the text, of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.words += " "

    def handle_data(self, data):
        self.words += data


def test_the_report_as_a_page(graded: Path, tmp_path: Path):
    said = run("report", graded / "records", "--html", tmp_path / "class.html")[1]
    assert str(tmp_path / "class.html") in said
    text = (tmp_path / "class.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and "prefers-color-scheme: dark" in text
    assert "http" not in text and not any(tag in ("script", "link", "img", "iframe") for tag, _ in page.tags)
    links = [found["href"] for tag, found in page.tags if tag == "a"]
    assert links == ["#e01", "#e20"] and {"e01", "e20"} <= {found.get("id") for _, found in page.tags}
    words = " ".join(page.words.split())
    assert "6 submissions, 1.5 of 9 points on average" in words
    assert "2 x" in words and "cut off towards zero instead of rounded (truncates)" in words
    assert "e01: Dan Doe, bob" in words and "hints taken by 1;" in words
    assert words.count("alice 9 3 6") == 1


def test_names_of_students_are_no_markup():
    row = {
        "title": "T", "points": 1, "earned": 0, "status": "fail", "checks": [], "shape": None, "seconds": 0.0,
        "misconception": "", "explanation": "", "hints": 0,
    }  # fmt: skip
    name = "<script>alert(1)</script>\"'&"
    record = {"student": name, "earned": 0, "points": 1, "problem": "<b>no zip</b>", "exercises": {"e01": row}}
    page = Page(class_page(examine([record])))
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert name in page.words and "<b>no zip</b>" in page.words


def test_shapes_ignore_names_and_comments_and_nothing_else():
    assert shape_of("def f(x):\n    # why\n    return x + 1\n") == shape_of("def g(y):\n    return y + 1\n")
    assert shape_of("def f(x):\n    return x + 1\n") != shape_of("def f(x):\n    return x + 2\n")
    assert shape_of("def f(x):\n    return x + 1\n") != shape_of("def f(x):\n    return x - 1\n")


def test_own_key_draws_other_numbers(submissions: Path, tmp_path: Path):
    (tmp_path / "key").write_text("short")
    with pytest.raises(ValueError, match="16 or more"):
        run("grade", submissions, "--seed-key", tmp_path / "key")
    (tmp_path / "key").write_text("0123456789abcdef0123456789abcdef")
    folder = submissions / "alice"
    common = ["--one", "--csv", tmp_path / "c.csv", "--json", tmp_path / "r", "--exercises", "e01"]
    results = tmp_path / "autograder" / "results.json"
    run("grade", folder, *common, "--seed-key", tmp_path / "key", "--gradescope", results)
    assert json.loads(results.read_text())["score"] == E01.points


def test_gradescope_results(submissions: Path, tmp_path: Path):
    common = ["--one", "--csv", tmp_path / "c.csv", "--json", tmp_path / "r", "--exercises", "e01"]
    run("grade", submissions / "bob.zip", *common, "--gradescope", tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["score"] == 0 and sum(test["max_score"] for test in found["tests"]) == E01.points
    assert {test["status"] for test in found["tests"]} == {"failed"}
    assert found["tests"][0]["tags"] == ["truncates"] and "cut off towards zero" in found["tests"][0]["output"]
    assert "first mismatch" in found["tests"][0]["output"]


def test_gradescope_results_are_weighted(submissions: Path, tmp_path: Path):
    (tmp_path / "weights.toml").write_text("e01 = 1.5\n")
    common = ["--one", "--csv", tmp_path / "c.csv", "--json", tmp_path / "r", "--exercises", "e01"]
    weights = ("--weights", tmp_path / "weights.toml")
    run("grade", submissions / "alice", *common, *weights, "--gradescope", tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["score"] == sum(test["max_score"] for test in found["tests"]) == 1.5 * E01.points
    assert all(test["score"] == test["max_score"] for test in found["tests"])


def test_isolation_can_be_required(submissions: Path, monkeypatch):
    monkeypatch.setattr("minift.course.runner.has_namespaces", lambda: False)
    with pytest.raises(ValueError, match="network cannot be taken away"):
        run("grade", submissions, "--require-isolation")


def test_gradescope_zip(tmp_path: Path):
    wheel = tmp_path / "minift-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    (tmp_path / "key").write_text("0123456789abcdef")
    (tmp_path / "weights").write_text("e01 = 0.5\n")
    given = ("--seed-key", tmp_path / "key", "--weights", tmp_path / "weights", "--wheel", wheel)
    said = run("gradescope", "-o", tmp_path / "a.zip", *given, "--exercises", "e01-e20", "--index-url", "http://cpu")[1]
    most = sum(one.points for one in chosen("e01-e20")) - E01.points / 2
    assert f"a.zip: {most} points in 20 exercises" in said
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert set(archive.namelist()) == {"setup.sh", "run_autograder", "seed.key", "weights.toml", wheel.name}
        script, setup = archive.read("run_autograder").decode(), archive.read("setup.sh").decode()
        assert archive.getinfo("run_autograder").external_attr >> 16 & 0o111
        assert archive.read(wheel.name) == b"a wheel" and archive.read("weights.toml") == b"e01 = 0.5\n"
    assert script.startswith("#!") and "--exercises e01-e20 --seed-key seed.key --weights weights.toml" in script
    # The torch of that index is one that minift can be installed with, and minift comes after it.
    torch, minift = setup.splitlines()[-2:]
    assert (
        "--index-url http://cpu 'torch" in torch
        and "<2.14" in torch
        and minift.endswith(f"/autograder/source/{wheel.name}")
    )


def test_ranges_of_exercises():
    assert [one.id for one in chosen("e01")] == ["e01"]
    assert [one.id for one in chosen("e20,e01")] == ["e01", "e20"]
    assert {"e01", "e20"} <= {one.id for one in chosen("e01-e20")} and "e23" not in {
        one.id for one in chosen("e01-e20")
    }
    assert len(chosen("")) == len(EXERCISES)
    with pytest.raises(ValueError, match="no exercise"):
        chosen("e99")


def test_release_holds_some_exercises_only(tmp_path: Path, monkeypatch):
    run("release", "-o", tmp_path / "week1", "--exercises", "e20")
    assert {path.name for path in (tmp_path / "week1").glob("e*.py")} == {"e20_lora_by_hand.py"}
    monkeypatch.chdir(tmp_path / "week1")
    assert "e01" not in run("list")[1] and "e20" in run("list")[1]


def test_a_new_exercise_is_fit_as_it_is(tmp_path: Path):
    run("new", tmp_path / "e27_my_topic")
    status, said = run("selfcheck", tmp_path / "e27_my_topic", "--seeds", 2)
    assert status == 0, said
    with pytest.raises(ValueError, match="call it like"):
        run("new", tmp_path / "Topic")


def test_selfcheck_finds_a_mistake_that_gets_through(tmp_path: Path):
    folder = tmp_path / "e27_my_topic"
    run("new", folder)
    checks = (folder / "checks.py").read_text()
    (folder / "checks.py").write_text(
        checks.replace("torch.randn(3, 7, generator=draw)", "torch.rand(3, 7, generator=draw)")
    )
    status, said = run("selfcheck", folder, "--seeds", 2)
    assert status == 1 and "PROBLEM e27 magnitude" in said  # positive inputs only: losing the sign goes unnoticed
