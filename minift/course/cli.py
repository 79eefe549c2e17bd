"""The student's commands. The teacher's and the author's are in `cli_teacher.py`.

Exit status: 0 done and passed, 1 a check is not passed, 2 bad input, 130 stopped by Ctrl-C.
"""

import difflib
import json
import sys
from pathlib import Path

import click

from minift.course import registry, workspace
from minift.course.cli_teacher import TEACHER
from minift.course.marks import plain
from minift.course.render import ascii_only, listing, show
from minift.course.spec import Exercise
from minift.course.workspace import Workspace


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.pass_context
def cli(context: click.Context) -> int:
    """Exercises on fine-tuning, with checks that know the usual mistakes.

    Without a command: what is next in this course folder.
    """
    return _next() if context.invoked_subcommand is None else 0


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its status."""
    try:
        status = cli.main(arguments, prog_name="minift-course", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nStopped.", err=True)
        status = 130
    except (ValueError, OSError, RuntimeError) as error:
        click.echo(f"Error: {error}", err=True)
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


def _here() -> Workspace:
    return workspace.find(Path.cwd())


def _current(space: Workspace, exercises: dict[str, Exercise]) -> Exercise | None:
    return next((one for one in exercises.values() if one.id not in space.passed), None)


def _next() -> int:
    space = _here()
    exercises = space.exercises(registry.all_exercises())
    one = _current(space, exercises)
    if one is None:
        click.echo("Everything is passed. To hand it in: minift-course submit")
        return 0
    click.echo(f"Next: {one.id} {one.title}, {one.minutes} minutes. Page: {space.folder / one.page_name}")
    return _check(one, space)


def _check(
    exercise: Exercise,
    space: Workspace | None,
    file: Path | None = None,
    as_json: bool = False,
    isolation: bool = False,
) -> int:
    """Grade a file, or what the folder has for the exercise; then the folder's record is kept."""
    from minift.course.grader import Grader

    with Grader() as grader:
        if space is None:
            assert file is not None
            verdict = grader.grade_file(exercise, file)
        else:
            path, data = space.code(exercise)
            verdict = grader.grade_bytes(exercise, data, path.absolute())
    click.echo(json.dumps(plain(verdict), indent=2) if as_json else show(verdict, isolation))
    if verdict.status == "not_started" and space is not None and not as_json:
        click.echo(f"  what to write: {space.folder / exercise.page_name}")
    first = space is not None and space.note(exercise, verdict.earned, verdict.status == "pass")
    if first and not as_json:
        click.echo(f"Passed. The solution is in solutions/{exercise.file_name} now: compare it with yours.")
    return 0 if verdict.status == "pass" else 1


@cli.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default="my-course")
def init(folder: Path) -> None:
    """Make a course folder, or renew one: what you changed stays, with a newer text beside it as NAME.new."""
    known = workspace.read(folder) or Workspace(folder)
    exercises = list(known.exercises(registry.all_exercises()).values())
    _, written = workspace.make(folder, exercises)
    points = sum(one.points for one in exercises)
    click.echo(f"{len(written)} files written in {folder.absolute()}: {len(exercises)} exercises, {points} points.")
    for name in written:
        if name.endswith(".new"):
            click.echo(f"  {name} is a newer text of a file that you changed: compare, then delete it")
    click.echo(f"Go on with:  cd {folder}  and  minift-course")


@cli.command()
@click.argument("exercise", required=False)
@click.option("--file", "path", type=click.Path(dir_okay=False, path_type=Path), help="Check this file instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Also say how far your code is kept apart while it runs.")
def check(exercise: str | None, path: Path | None, as_json: bool, verbose: bool) -> int:
    """Check one exercise, or the next that is not passed."""
    space = None if path is not None and exercise else _here()
    exercises = registry.all_exercises() if space is None else space.exercises(registry.all_exercises())
    one = registry.find(exercise, exercises) if exercise else _current(_here(), exercises)
    if one is None:
        click.echo("Everything is passed; name an exercise to check it again.")
        return 0
    return _check(one, None if path is not None else space, path, as_json, verbose)


@cli.command()
@click.argument("exercise", required=False)
@click.option("--once", is_flag=True, help="Stop after the first check.")
def watch(exercise: str | None, once: bool) -> int:
    """Check at every save, and go on to the next exercise when one is passed.

    Keys in a terminal: n next, h hint, l list, r run again, q quit.
    """
    from minift.course.watch import follow

    space = _here()
    exercises = space.exercises(registry.all_exercises())
    chosen = [registry.find(exercise, exercises)] if exercise else list(exercises.values())
    return follow(space, [one for one in chosen if exercise or one.id not in space.passed], click.echo, once)


@cli.command()
@click.argument("exercise")
@click.option("--level", type=click.IntRange(1, 3), help="1 direction, 2 what to test, 3 nearly the steps.")
def hint(exercise: str, level: int | None) -> None:
    """The next hint. Which hints were shown is recorded, and costs nothing."""
    number, text = _here().hint(registry.find(exercise), level)
    click.echo(f"Hint {number} of 3: {text}")


@cli.command(name="list")
def list_() -> None:
    """All exercises: passed or not, points, minutes, what is good to have done before."""
    space = _here()
    click.echo(listing(space.exercises(registry.all_exercises()).values(), space))


@cli.command()
@click.argument("exercise")
@click.option("--give-up", is_flag=True, help="Show it although the exercise is not passed; this is recorded.")
def solution(exercise: str, give_up: bool) -> int:
    """The solution, once an exercise is passed, as a difference to your file."""
    space, one = _here(), registry.find(exercise)
    if one.id not in space.passed and not give_up:
        click.echo(
            f"{one.id} is not passed yet. A hint: minift-course hint {one.id}. Or: --give-up (recorded).", err=True
        )
        return 1
    if one.id not in space.passed:
        space.given_up.setdefault(one.id, workspace.now())
        space.save()
    target, path = space.reveal(one), space.path(one)
    yours = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    lines = difflib.unified_diff(yours, one.text("solution.py").splitlines(), path.name, str(target), lineterm="")
    click.echo(ascii_only("\n".join(lines)))
    return 0


@cli.command()
@click.argument("exercise")
def reset(exercise: str) -> None:
    """Put the starter back; your file is kept beside it."""
    kept = _here().reset(registry.find(exercise))
    click.echo(f"The starter is back.{f' Your file is kept as {kept}.' if kept else ''}")


@cli.command()
@click.argument("exercise")
@click.option("--show", "number", type=int, help="Print the code with this mistake.")
def bughunt(exercise: str, number: int | None) -> int:
    """The exercise turned round: write a test that finds the mistakes in given code."""
    from minift.course.bughunt import hunt, starter
    from minift.course.runner import Runner

    space, one = _here(), registry.find(exercise)
    if one.id not in space.passed and one.id not in space.given_up:
        click.echo(f"The hunt shows code that is nearly right: pass {one.id} first.", err=True)
        return 1
    path = space.folder / f"bughunt_{one.id}.py"
    if number is not None:
        if not 1 <= number <= len(one.mutants):
            raise ValueError(f"{one.id} has mistakes 1 to {len(one.mutants)}, not {number}")
        click.echo(one.mutants[number - 1].source(one.text("solution.py")))
        return 0
    if not path.exists():
        path.write_text(starter(one), encoding="utf-8")
        click.echo(f"Write your test in {path}, then run this command again. {len(one.mutants)} mistakes are hidden.")
        return 0
    with Runner() as runner:
        result = hunt(one, path.read_text(encoding="utf-8"), runner)
    if result.problem:
        click.echo(f"Not run: {result.problem}")
        return 1
    click.echo(f"{one.id}: your test finds {result.score} mistakes.")
    if result.rejected:
        click.echo(f"It rejects code that is right ({', '.join(result.rejected)}), so nothing counts yet.")
    elif result.missed:
        click.echo(
            f"Not found: {', '.join(map(str, result.missed))}. To see one: bughunt {one.id} --show {result.missed[0]}"
        )
    return 1 if result.rejected or result.missed else 0


@cli.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default="submission.zip")
def submit(output: Path) -> None:
    """Check everything once more and put your files into one zip to hand in."""
    from minift.course.submission import pack_submission

    space = _here()
    earned, total = pack_submission(space, list(space.exercises(registry.all_exercises()).values()), output, click.echo)
    click.echo(f"{output.absolute()}: {earned} of {total} points with the public numbers. Hand in this file.")


@cli.command()
def doctor() -> int:
    """Is everything there that the course needs?"""
    from minift.course.doctor import examine

    findings = examine(Path.cwd())
    for ok, text in findings:
        click.echo(f"  {'ok   ' if ok else 'LACKS'}  {text}")
    return 0 if all(ok for ok, _ in findings) else 1


for _command in TEACHER:
    cli.add_command(_command)
