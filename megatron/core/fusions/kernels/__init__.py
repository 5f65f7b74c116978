"""The Triton form of the operations in `megatron.core.fusions`, for CUDA devices; the only importer of triton.

Launchers take and return plain tensors and know nothing of autograd. Indices into tensors are 64-bit wherever a row
number is multiplied by a width, since a layer's rows times its width pass 2^31.
"""
