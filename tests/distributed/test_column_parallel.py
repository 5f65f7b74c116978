"""The split product: the numbers of the whole one, its communication behind products, and only a slice kept."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_testing import run_distributed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel.column_parallel import column_parallel_linear

SEQUENCE, BATCH, WIDTH, COLUMNS = 8, 3, 6, 10


class OperationLog(TorchDispatchMode):
    """Names of products and collectives, in order; a star marks a collective that is not waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            values = {argument.name: argument.default_value for argument in func._schema.arguments}
            values |= dict(zip(values, args, strict=False))
            self.names.append(name + "*" * values["async_op"])
        elif name in ("mm", "addmm"):
            self.names.append("product")
        return func(*args, **(kwargs or {}))


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = (SEQUENCE, BATCH, WIDTH), (COLUMNS, WIDTH), (SEQUENCE, BATCH, COLUMNS)
    x, weight, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, weight, grad


def split_product(rank: int, world_size: int, sequence_parallel: bool) -> dict[str, Any]:
    group = Group(tuple(range(world_size)), rank, dist.group.WORLD)
    x, weight, grad = operands()
    x = x.chunk(world_size)[rank] if sequence_parallel else x
    x, weight = x.clone().requires_grad_(), weight.chunk(world_size)[rank].clone().requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = column_parallel_linear(x, weight, group, sequence_parallel)
    with OperationLog() as log:
        y.backward(grad.chunk(world_size, dim=-1)[rank])
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad, "kept": sum(kept.values()), "log": log.names}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_equals_the_whole_product_and_keeps_only_a_slice(sequence_parallel: bool) -> None:
    x, weight, grad = operands()
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = F.linear(*leaves)
    y.backward(grad)
    first, second = run_distributed(split_product, 2, sequence_parallel)
    torch.testing.assert_close(torch.cat((first["y"], second["y"]), dim=-1), y.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.cat((first["weight"], second["weight"])), weight.grad, rtol=1e-13, atol=1e-13)
    for outcome, whole in zip((first, second), x.grad.chunk(2) if sequence_parallel else (x.grad, x.grad), strict=True):
        torch.testing.assert_close(outcome["x"], whole, rtol=1e-13, atol=1e-13)

    input_bytes = 8 * math.prod(x.shape) // (2 if sequence_parallel else 1)
    assert first["kept"] == input_bytes
    # the gradient of x is computed while the input is gathered, that of the weight while the gradient of x is summed
    overlapped = ["_allgather_base_*", "product", "_reduce_scatter_base_*", "product"]
    assert first["log"] == (overlapped if sequence_parallel else ["product", "allreduce_*", "product"])
