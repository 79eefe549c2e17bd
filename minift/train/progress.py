"""The progress bar of a run: steps, time left, loss and speed."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

WINDOW = 10  # steps over which the speed is averaged


@contextmanager
def progress_bar(total: int, done: int) -> Iterator[Callable[[Any], None]]:
    """Yield a function that is called with the record of each step."""
    recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)
    layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed} + {remaining} left{postfix}]"
    last_look = ""
    with tqdm(total=total, initial=done, desc="Training", bar_format=layout, dynamic_ncols=True) as bar:

        def report(record: Any) -> None:
            nonlocal last_look
            if record.eval_loss is not None:
                last_look = f"evaluation {record.eval_loss:.3f}, "
            recent.append((record.tokens, record.seconds))
            speed = sum(tokens for tokens, _ in recent) / sum(seconds for _, seconds in recent)
            bar.set_postfix_str(f"loss {record.loss:.3f}, {last_look}{speed:.0f} tokens/s", refresh=False)
            bar.update()

        yield report
