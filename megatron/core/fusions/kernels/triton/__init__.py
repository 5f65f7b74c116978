"""Triton kernels for CUDA devices; the only importer of triton.

Indices into tensors are 64-bit wherever a row number is multiplied by a width, since a layer's rows times its width
pass 2^31.
"""
