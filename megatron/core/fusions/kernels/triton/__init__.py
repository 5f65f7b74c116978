"""Triton kernels for CUDA devices; the only importer of triton.

Indices into tensors are 64-bit wherever a row number is multiplied by a width, since a layer's rows times its width
pass 2^31.

Numbers that differ from one step to the next (rows, pairs, tokens) are not specialized: a kernel that Triton compiles,
or the driver loads, in the middle of a run keeps the host waiting, and with it all ranks.
"""
