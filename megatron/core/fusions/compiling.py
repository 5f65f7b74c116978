"""Whether kernels can be compiled on this machine."""

import torch

from megatron.core.fusions.swiglu import swiglu


def compile_failure(device: torch.device) -> str:
    """Why no kernel can be compiled for a GPU, in a line; empty if one can."""
    try:
        swiglu(torch.ones(1, 16, device=device), torch.ones(1, device=device))
    except Exception as error:  # a compiler's: any type, often many lines
        return (str(error).strip() or type(error).__name__).splitlines()[-1]
    return ""
