"""What a person reads after a check: one screen, plain ASCII, the most useful line first."""

from minift.course.judge import ADVICE, Verdict

_WORDS = {
    "pass": "PASS", "fail": "FAIL", "not_started": "TODO", "timeout": "TIME", "memory": "MEM ", "crash": "DIED",
    "policy": "RULE", "import_error": "LOAD", "not_graded": "----",
}  # fmt: skip
_PRINTED_LINES = 20


def ascii_only(text: str) -> str:
    """For consoles of every kind: what is not ASCII becomes an escape."""
    return text.encode("ascii", "backslashreplace").decode()


def _points(number: int) -> str:
    return f"{number} point{'' if number == 1 else 's'}"


def heading(verdict: Verdict) -> list[str]:
    """What was graded, and for how much: always with path and hash."""
    return [
        f"{verdict.exercise} {verdict.title}: {verdict.earned} of {_points(verdict.points)}",
        f"  graded: {verdict.path}",
        f"          sha256 {verdict.sha256[:16]}, {verdict.seconds:.2f} s",
    ]


def explanation(verdict: Verdict) -> list[str]:
    """The recognised mistake, if there is one."""
    if not verdict.explanation:
        return []
    return [f"        this is exactly what you get when {verdict.explanation}", f"        -> {verdict.advice}"]


def show_checks(verdict: Verdict) -> list[str]:
    """One line a check, and more for the first that is wrong."""
    lines, explained = [], False
    for one in verdict.checks:
        earned = str(one.points) if one.status == "pass" else f"0/{one.points}"
        lines.append(f"  {_WORDS[one.status]}  {one.sentence}  [{one.name}, {earned}]")
        if one.status in ("pass", "not_started") or one.message == verdict.message:
            continue
        lines.append(f"        {one.message}")
        if not explained:
            lines += [f"        {line}" for line in one.details]
            lines += explanation(verdict)
            explained = True
    return lines


def show(verdict: Verdict, isolation: bool = False) -> str:
    """The whole screen of one exercise."""
    lines = heading(verdict)
    if verdict.message:
        lines += [f"  {_WORDS[verdict.status]}  {verdict.message}"]
        if verdict.status in ADVICE and ADVICE[verdict.status] != verdict.message:
            lines.append(f"        {ADVICE[verdict.status]}")
    lines += show_checks(verdict)
    if verdict.printed.strip() and verdict.status != "pass":
        printed = verdict.printed.strip().splitlines()
        lines.append("  printed by your code:")
        lines += [f"    | {line[:160]}" for line in printed[:_PRINTED_LINES]]
        if len(printed) > _PRINTED_LINES:
            lines.append(f"    | ... {len(printed) - _PRINTED_LINES} more lines")
    if verdict.status == "not_started" and not verdict.message:
        lines.append(f"  {ADVICE['not_started']}, save, and check again")
    if verdict.status in ("fail", "not_started"):
        lines.append(f"  -> a hint: minift-course hint {verdict.exercise}")
    if isolation:
        lines.append(f"  isolation: {verdict.isolation}")
    return ascii_only("\n".join(lines))
