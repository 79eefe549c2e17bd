"""What is handed in may be anything: archives that are none, that are too large, that point elsewhere; names twice."""

import os
import sys
import zipfile
from pathlib import Path

import pytest

from minift.course import registry
from minift.course.cli import cli
from minift.course.collect import ALTOGETHER, LARGEST, collect, read_submission

EXERCISES = list(registry.all_exercises().values())


def archive(path: Path, **texts: str | bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in texts.items():
            file.writestr(name.replace("__", "/") + ".py", text)
    return path


def test_a_zip_that_is_none(tmp_path: Path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 no zip")
    assert "a.zip cannot be read" in read_submission(tmp_path / "a.zip", EXERCISES).problem


@pytest.mark.parametrize("place", range(60, 4000, 397))
def test_a_zip_with_a_damaged_byte(tmp_path: Path, place: int):
    """Whatever a flipped byte does to the stream, it is a sentence and no exception."""
    path = archive(tmp_path / "a.zip", e01_absmax=os.urandom(3000).hex(), e20_lora_by_hand="x = 1\n")
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 0xFF
    path.write_bytes(data)
    found = read_submission(path, EXERCISES)
    assert found.problem or found.files


def test_a_zip_that_is_larger_inside(tmp_path: Path):
    """10 GB of zeros in a small file: its head says so, and it is not unpacked. So for many that are just allowed."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("e01_absmax.py", "w", force_zip64=True) as inside:
            for _ in range(16):
                inside.write(bytes(LARGEST))
        file.writestr("e20_lora_by_hand.py", "x = 1\n")
    found = read_submission(path, EXERCISES)
    assert set(found.files) == {"e20"} and f"{16 * LARGEST} bytes, which is too much" in found.problem
    many = archive(
        tmp_path / "b.zip", **{f"d{i}__e01_absmax": bytes(LARGEST) for i in range(ALTOGETHER // LARGEST + 3)}
    )
    found = read_submission(many, EXERCISES)
    assert "too much" in found.problem and len(found.files["e01"][1]) == LARGEST


def test_paths_that_lead_out_are_names_only(tmp_path: Path):
    inner = tmp_path / "in"
    inner.mkdir()
    path = inner / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../e01_absmax.py", "x = 1\n")
        file.writestr("/etc/e20_lora_by_hand.py", "x = 2\n")
    assert set(read_submission(path, EXERCISES).files) == {"e01", "e20"}
    assert [one.name for one in tmp_path.rglob("*.py")] == []


def test_files_that_are_too_large_or_not_there_are_named(tmp_path: Path):
    (tmp_path / "e01_absmax.py").write_bytes(b"#" * (LARGEST + 1))
    assert "e01_absmax.py has 1048577 bytes" in read_submission(tmp_path, EXERCISES).problem
    (tmp_path / "e01_absmax.py").rename(tmp_path / "mine.py")
    assert "holds no file called like e01_absmax.py" in read_submission(tmp_path, EXERCISES).problem


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_are_not_followed(tmp_path: Path):
    (tmp_path / "secret.py").write_text("x = 1\n")
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "e01_absmax.py").symlink_to(tmp_path / "secret.py")
    assert read_submission(tmp_path / "ann", EXERCISES).files == {}


def test_two_students_of_one_name_stay_two(tmp_path: Path):
    for number in (991, 992):
        (tmp_path / f"Jane Doe_{number}_assignsubmission_file_").mkdir()
        (tmp_path / f"Jane Doe_{number}_assignsubmission_file_" / "e01_absmax.py").write_text(f"x = {number}\n")
    for name in ("roe_5_71_e01_absmax.py", "roe_5_72_e20_lora_by_hand.py"):  # Canvas: one student, two files
        (tmp_path / name).write_text("x = 5\n")
    found = {one.student: one.files for one in collect(tmp_path, EXERCISES)}
    assert {name: set(files) for name, files in found.items()} == {
        "Jane Doe (991)": {"e01"}, "Jane Doe (992)": {"e01"}, "roe": {"e01", "e20"},
    }  # fmt: skip
    assert found["Jane Doe (992)"]["e01"][1] == b"x = 992\n"


def test_hints_are_read_from_either_record(tmp_path: Path):
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "e01_absmax.py").write_text("x = 1\n")
    (tmp_path / "ann" / ".minift-course.json").write_text('{"hints": {"e01": 2, "e99": 1, "e20": 0}, "passed": {}}')
    with zipfile.ZipFile(tmp_path / "bob.zip", "w") as file:
        file.writestr("e01_absmax.py", "x = 1\n")
        file.writestr("manifest.json", '{"exercises": {"e01": {"hints": 3}, "e20": {"hints": 0}}}')
    found = list(collect(tmp_path, EXERCISES))
    assert [one.hints for one in found] == [{"e01": 2}, {"e01": 3}] and found[0].digest != found[1].digest


@pytest.mark.parametrize(
    "record",
    ["", "[]", "7", "null", "{}", '{"hints": 3}', '{"hints": {"e01": -1}}', '{"hints": {"e01": true}}',
     '{"hints": {"e01": 10000000000}}', '{"exercises": [1]}', '{"exercises": {"e01": 5}}', "[" * 100_000],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_a_record_that_is_none_stops_nobody(tmp_path: Path, record: str):
    (tmp_path / "e01_absmax.py").write_text("x = 1\n")
    (tmp_path / ".minift-course.json").write_text(record)
    found = read_submission(tmp_path, EXERCISES)
    assert found.hints == {} and set(found.files) == {"e01"} and found.problem == ""


def test_the_folder_of_the_records_is_no_student(tmp_path: Path):
    (tmp_path / "ann").mkdir()
    (tmp_path / "records").mkdir()
    assert [one.student for one in collect(tmp_path, EXERCISES, tmp_path / "records")] == ["ann"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["grade", "nowhere"], 2, "does not exist"),
        (["grade", "file.txt"], 2, "is a file: unpack it into a folder"),
        (["grade", "."], 2, "has no submissions"),
        (["grade", ".", "--seeds", "0"], 2, "not in the range"),
        (["grade", ".", "--jobs", "0"], 2, "not in the range"),
        (["grade", ".", "--exercises", "e99"], 2, "no exercise 'e99'; there are e01"),
        (["grade", ".", "--exercises", "e01-"], 2, "no submissions"),
        (["report", "nowhere"], 2, "does not exist"),
        (["report", "."], 2, "has no records"),
        (["check", "e99", "--file", "file.txt"], 2, "no exercise 'e99'"),
        (["check", "e01"], 2, "minift-course init"),
        (["hint", "e01"], 2, "minift-course init"),
        (["submit"], 2, "minift-course init"),
        (["init", "file.txt"], 2, "is a file"),
        (["new", "Topic"], 2, "call it like e27_my_topic"),
        (["selfcheck", "nothing"], 2, "no exercise 'nothing'"),
        (["walk"], 2, "No such command"),
    ],
    ids=str,
)
def test_wrong_input_is_a_sentence(tmp_path: Path, monkeypatch, capsys, arguments, status: int, said: str):
    from minift.course.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == status and said in shown.err, shown
    assert cli.name and "Traceback" not in shown.err
