"""Triton kernels behind minift's operators. Each file has the stem of the minift file whose operator it serves.

Nothing is imported here: Triton is loaded when the first CUDA tensor arrives.
"""
