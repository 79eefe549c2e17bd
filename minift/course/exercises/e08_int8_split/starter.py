"""e08 LLM.int8 split: README.md says what to write. Check with: minift-course check e08"""

import torch
from torch import Tensor


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, columns) -> q int8 of the same shape, absmax (rows,); a row of zeros gives 0 and 0."""
    # TODO
    raise NotImplementedError


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """x (rows, columns) -> bool (columns,): whether the column has any |x| >= threshold."""
    # TODO
    raise NotImplementedError


def matmul(x: Tensor, q_w: Tensor, absmax_w: Tensor, threshold: float) -> Tensor:
    """x (tokens, in), q_w int8 (out, in), absmax_w (out,) -> y (tokens, out)."""
    # TODO: integers for the columns without outliers, float with the decoded weight for the others
    raise NotImplementedError
