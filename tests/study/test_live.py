"""Live bytes against sizes that can be counted by hand."""

import torch

from minift.study.live import LiveBytes

MB = 1_000_000


def block(megabytes: int) -> torch.Tensor:
    return torch.empty(megabytes * MB, dtype=torch.uint8)


def test_the_most_at_one_time_not_the_sum():
    with LiveBytes() as live:
        first = block(3)
        del first
        second, third = block(2), block(4)
        del second
        assert (live.now, live.peak) == (4 * MB, 6 * MB)
        del third
    assert (live.now, live.peak) == (0, 6 * MB)


def test_what_was_there_before_and_views_do_not_count():
    old = block(5)
    with LiveBytes() as live:
        view = old[: 2 * MB].view(2, MB)
        old.add_(1)
        new = block(1)
        same = new.view(10, -1)[3:]
        assert live.peak == MB
    assert view.shape[0] == 2 and same.numel() > 0
    del old, view
    assert live.now == MB  # freeing what never counted takes nothing off


def test_what_is_freed_after_the_block_counts_no_more():
    with LiveBytes() as live:
        kept = block(2)
    assert live.now == 2 * MB
    del kept
    assert live.now == 0


def test_the_backward_pass_is_seen():
    """x * x keeps nothing new; its exp keeps its result; the gradients of both are there at once, one at a time."""
    x = torch.ones(250_000, requires_grad=True)  # 1 MB
    with LiveBytes() as live:
        y = (x * x).exp()
        assert live.now == MB  # the square was freed, exp's result kept
        y.sum().backward()
    assert x.grad is not None
    # y, the gradient of the sum (expanded: 4 bytes), that of exp, then two terms of x and their sum
    assert 3 * MB <= live.peak <= 6 * MB
