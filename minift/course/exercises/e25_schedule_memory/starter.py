"""e25 Cosine schedule and memory estimate: README.md says what to write. Check with: minift-course check e25"""


def lr_at(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """The learning rate of update number `step`, counted from 0."""
    # TODO: straight up, down along half a cosine, then floor for ever
    raise NotImplementedError


def nf4_bytes(out_features: int, in_features: int) -> int:
    """Bytes of a matrix in NF4 with double quantization."""
    # TODO: codes, one byte for each 64 of them, four for each 256 of those, four more
    raise NotImplementedError


def estimate(model: dict, method: str, r: int = 16) -> dict:
    """Bytes of weights, gradients and optimizer state when `model` is trained by "full", "lora" or "qlora"."""
    # TODO: which numbers are stored in which format, and which of them are trained?
    raise NotImplementedError
