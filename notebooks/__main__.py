"""Run the study notebooks and keep what they show: `python -m notebooks [NUMBER ...] [--check]`.

A notebook is committed with its outputs, so that it can be read without running it, and so that a reader sees what the
author saw. Each is run from a clean kernel, in an empty folder; what varies from run to run (times, addresses, progress
bars) is left out. With `--check` nothing is written: what comes out is compared with what is stored.
"""

import sys
import time

import click

from notebooks.outputs import differences, run, stored, studies, write


@click.command(help=__doc__)
@click.argument("numbers", nargs=-1)
@click.option("--check", is_flag=True, help="Compare with the stored outputs; write nothing.")
def main(numbers: tuple[str, ...], check: bool) -> None:
    chosen = [path for path in studies() if not numbers or path.name.startswith(numbers)]
    if not chosen:
        raise click.UsageError(
            f"no notebook begins with {' or '.join(numbers)}; there are {[p.stem for p in studies()]}"
        )
    bad = False
    for path in chosen:
        start = time.monotonic()
        fresh = run(path)
        seconds = time.monotonic() - start
        if not check:
            write(fresh, path)
        found = differences(stored(path), fresh) if check else []
        click.echo(f"{path.name}: {seconds:.0f} s" + "".join(f"\n  {line}" for line in found))
        bad |= bool(found)
    sys.exit(bad)


if __name__ == "__main__":
    main()
