"""The child process of the judge: these files import only the standard library and torch, never minift.

The parent starts them as a top-level package `worker` in isolated mode (see `minift.course.runner`), so that the
library, which is the reference implementation of half the exercises, is not even on the path of a submission.
"""
