"""The commands of teachers and authors."""

import os
from pathlib import Path
from typing import Any

import click

from minift.course import registry
from minift.course.spec import Exercise

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_OUT = click.Path(path_type=Path)
_exercises = click.option("--exercises", "wanted", default="", help="Such as e01-e08,e20; all by default.")
_key = click.option("--seed-key", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                    help="File with your own key: then nobody knows the numbers beforehand.")  # fmt: skip
_weights = click.option("--weights", "weights_path", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                        help="TOML file of factors on the points in the totals, such as e01 = 2.")  # fmt: skip
_seeds = click.option("--seeds", type=click.IntRange(1), default=2, help="Draws of the inputs for each check.")
_MOST_JOBS = 8  # each holds a process with torch in it, some 300 MB


def chosen(wanted: str) -> list[Exercise]:
    """The exercises that a text such as e01-e08,e20 names, in the order of the course."""
    exercises = registry.all_exercises()
    if not wanted:
        return list(exercises.values())
    order, names = list(exercises), set()
    for part in wanted.split(","):
        first, _, last = part.strip().partition("-")
        ends = [order.index(registry.find(name, exercises).id) for name in (first, last or first)]
        names.update(order[ends[0] : ends[1] + 1])
    return [exercises[name] for name in order if name in names]


def _key_of(path: Path | None) -> bytes:
    from minift.course.judge import PUBLIC_KEY

    if path is None:
        return PUBLIC_KEY
    key = path.read_bytes().strip()
    if len(key) < 16:
        raise ValueError(f"{path} holds {len(key)} bytes; a key needs 16 or more, such as `openssl rand -hex 16` gives")
    return key


@click.command()
@click.argument("submissions", type=click.Path(exists=True, path_type=Path))
@click.option("--csv", "csv_path", type=_OUT, default="grades.csv", show_default=True, help="One row a student.")
@click.option("--json", "out", type=_OUT, default="records", show_default=True, help="Folder for one record a student.")
@click.option("--jobs", type=click.IntRange(1), default=min(os.cpu_count() or 1, _MOST_JOBS),
              help="Submissions at a time; the number of cores by default, at most 8.")  # fmt: skip
@click.option("--one", is_flag=True, help="SUBMISSIONS is a single one: a folder, a zip or a file.")
@click.option("--gradescope", "results", type=_OUT, help="With --one: also write Gradescope's results.json here.")
@click.option("--require-isolation", is_flag=True, help="Refuse to run where the network cannot be taken away.")
@_exercises
@_weights
@_key
@_seeds
def grade(submissions: Path, csv_path: Path, out: Path, jobs: int, one: bool, results: Path | None,
          weights_path: Path | None, require_isolation: bool, wanted: str, seed_key: Path | None,
          seeds: int) -> None:  # fmt: skip
    """Grade submissions: folders, zips or single files. What was graded before is not graded again."""
    from tqdm import tqdm

    from minift.course.collect import collect, read_submission
    from minift.course.gradescope import write_results
    from minift.course.marks import grade_all, read_weights, total_of, write_csv
    from minift.course.runner import has_namespaces

    if results is not None and not one:
        raise click.UsageError("--gradescope needs --one")
    if require_isolation and not has_namespaces():
        raise ValueError(
            "the network cannot be taken away from a process here; run this on Linux with `unshare` allowed"
        )
    exercises = chosen(wanted)
    weights = read_weights(weights_path, exercises) if weights_path else {}
    found = [read_submission(submissions, exercises)] if one else list(collect(submissions, exercises, out))
    with tqdm(total=len(found), desc="graded", unit=" submissions", ascii=True) as bar:
        records = grade_all(found, exercises, out, _key_of(seed_key), seeds, jobs, bar.update)
    write_csv(records, exercises, csv_path, weights)
    for record in records:
        problem = f"  ({record['problem']})" if record["problem"] else ""
        earned, most = total_of(record, weights)
        click.echo(f"  {record['student']:30s} {earned:3} of {most}{problem}")
    if results is not None:
        write_results(records[0], results, secret=seed_key is not None, weights=weights)
    click.echo(f"{csv_path.absolute()}; records in {out.absolute()}; for the class: minift-course report {out}")


@click.command()
@click.argument("records", type=_FOLDER)
@click.option("--html", "page", type=click.Path(dir_okay=False, path_type=Path), help="Also write it as one web page.")
def report(records: Path, page: Path | None) -> None:
    """What the class found hard: pass rate of every check, the mistakes made, files that are the same."""
    from minift.course.class_page import class_page
    from minift.course.class_report import examine, format_class, read_records
    from minift.course.render import ascii_only
    from minift.course.whole import write_whole

    found = examine(read_records(records))
    click.echo(ascii_only(format_class(found)))
    if page is not None:
        write_whole(page, class_page(found))
        click.echo(f"\n{page.absolute()}: open it in a browser")


@click.command(name="gradescope")
@click.option("-o", "--output", type=_OUT, default="autograder.zip", show_default=True)
@click.option("--wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="The minift to grade with: what `pip wheel --no-deps .` makes in its repository.")  # fmt: skip
@click.option("--index-url", help="A pip index with torch for CPUs, some gigabytes less than the usual one on Linux.")
@_exercises
@_weights
@_key
@_seeds
def gradescope_zip(output: Path, wheel: Path, index_url: str | None, wanted: str, weights_path: Path | None,
                   seed_key: Path | None, seeds: int) -> None:  # fmt: skip
    """Build the autograder zip for Gradescope."""
    from minift.course.gradescope import build
    from minift.course.marks import read_weights, total

    exercises = chosen(wanted)
    weights = read_weights(weights_path, exercises) if weights_path else {}
    _key_of(seed_key)
    build(output, wheel, wanted, seeds, seed_key, weights_path, index_url)
    points = total({one.id: one.points for one in exercises}, weights)
    click.echo(f"{output.absolute()}: {points} points in {len(exercises)} exercises")


@click.command()
@click.option("-o", "--output", type=_OUT, required=True, help="Folder to make.")
@_exercises
def release(output: Path, wanted: str) -> None:
    """Make a course folder with some of the exercises, to give to students."""
    from minift.course import workspace

    exercises = chosen(wanted)
    _, written = workspace.make(output, exercises, [one.id for one in exercises])
    click.echo(f"{len(written)} files written in {output.absolute()}: {', '.join(one.id for one in exercises)}")


@click.command()
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to fill.")
@_exercises
def notebooks(output: Path, wanted: str) -> None:
    """Write the exercises as notebooks. Those in OUTPUT of the same name are replaced, answers and all."""
    from minift.course.notebook_files import write

    exercises = chosen(wanted)
    written = write(output, exercises)
    click.echo(f"{len(exercises)} notebooks in {output.absolute()}, {len(written)} files written")


@click.command()
@click.argument("folder", type=_OUT)
def new(folder: Path) -> None:
    """For authors: a new exercise that works, to be changed into yours. FOLDER is called like e27_my_topic."""
    from minift.course.scaffold import scaffold

    for path in scaffold(folder):
        click.echo(f"  {path}")
    click.echo(f"Try it: minift-course selfcheck {folder}")


def _one(name: str, known: dict[str, Exercise]) -> Exercise:
    folder = Path(name)
    return registry.read_exercise(folder) if (folder / "exercise.toml").exists() else registry.find(name, known)


@click.command()
@click.argument("exercises", nargs=-1)
@click.option("--seeds", type=click.IntRange(1), default=5, help="Draws of the inputs; 200 before a course is given.")
def selfcheck(exercises: tuple[str, ...], seeds: int) -> int:
    """For authors: is an exercise (by name or folder) fit to grade people? Kill matrix, margins, problems.

    Also makes small changes to the solution by rule: what no check notices is a hole, or is given a reason in
    survivors.toml.
    """
    from minift.course.ast_mutants import cast_net, format_net
    from minift.course.runner import Runner
    from minift.course.selfcheck import check_exercise, format_report

    known = registry.all_exercises()
    problems: list[Any] = []
    with Runner() as runner:
        for one in [_one(name, known) for name in exercises] or list(known.values()):
            found = check_exercise(one, runner, seeds)
            problems += found.problems
            click.echo(format_report(one, found))
            net = cast_net(one, runner)
            problems += net.holes + net.stale
            click.echo(format_net(one, net))
    return 1 if problems else 0


TEACHER = (grade, report, gradescope_zip, release, notebooks, new, selfcheck)
