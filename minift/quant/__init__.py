"""How a tensor is stored: codebooks, 8-bit blocks, 4-bit blocks with double quantization, and layers that use them."""

from minift.quant.blockwise import dequantize_blockwise, quantize_blockwise
from minift.quant.codebooks import codebook, dynamic_map
from minift.quant.fourbit import QuantState, dequantize_4bit, quantize_4bit
from minift.quant.linear import Linear4bit, QuantConfig, dequantize_model, quantize_model

__all__ = [
    "Linear4bit",
    "QuantConfig",
    "QuantState",
    "codebook",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_model",
    "dynamic_map",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_model",
]
