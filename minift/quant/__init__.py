"""How a tensor is stored: codebooks, 8-bit blocks, 4-bit blocks with double quantization, and layers that use them."""

from minift.quant.blockwise import dequantize_blockwise, quantize_blockwise
from minift.quant.codebooks import codebook, dynamic_map, symmetric_quantiles
from minift.quant.compiled import compile_kernels
from minift.quant.config import QuantConfig
from minift.quant.fourbit import QuantState, dequantize_4bit, quantize_4bit
from minift.quant.int8 import dequantize_rows, int8_linear, quantize_rows
from minift.quant.linear import Linear4bit, Linear8bit, QuantizedLinear
from minift.quant.matmul import matmul_4bit
from minift.quant.model import LayerReport, dequantize_model, format_report, quantize_model, swap_linears

__all__ = [
    "LayerReport",
    "Linear4bit",
    "Linear8bit",
    "QuantConfig",
    "QuantState",
    "QuantizedLinear",
    "codebook",
    "compile_kernels",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_model",
    "dequantize_rows",
    "dynamic_map",
    "format_report",
    "int8_linear",
    "matmul_4bit",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_model",
    "quantize_rows",
    "swap_linears",
    "symmetric_quantiles",
]
