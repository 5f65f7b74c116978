"""The least time of a training step: each matrix product by itself, by torch.matmul, and the optimizer's bytes."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.benchmarks.contestants import StepShape

COPY_ELEMENTS = 2**26
MOST_HEADS = 32
"""Attention heads timed in one call."""


@dataclass(frozen=True)
class Product:
    """[batch, rows, inner] x [batch, inner, columns], so often in a step."""

    name: str
    batch: int
    rows: int
    inner: int
    columns: int
    transposed: str
    """Which operands are stored the other way round: '', 'a', 'b'."""
    count: float
    copies: int
    """How many different operands are taken in turn, so that they are as cold as in the step."""

    @property
    def flops(self) -> int:
        """Operations of one product."""
        return 2 * self.batch * self.rows * self.inner * self.columns

    def operands(self, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Both factors and the place of the product, `copies` times."""

        def factor(rows: int, columns: int, transposed: bool) -> Tensor:
            stored = (columns, rows) if transposed else (rows, columns)
            # multiplied in place, so that no copy of a wider type is made
            drawn = torch.randn((self.batch, *stored), dtype=dtype, device=device).mul_(0.1)
            return (drawn.transpose(1, 2) if transposed else drawn).squeeze(0)

        made = []
        for _ in range(self.copies):
            a = factor(self.rows, self.inner, self.transposed == "a")
            b = factor(self.inner, self.columns, self.transposed == "b")
            made.append((a, b, torch.matmul(a, b)))
        return made


def _linear(name: str, rows: int, inner: int, columns: int, count: int, copies: int) -> Iterator[Product]:
    """y = x W^T with W [columns, inner], and its two gradients."""
    yield Product(f"{name}, forward", 1, rows, inner, columns, "b", count, copies)
    yield Product(f"{name}, data gradient", 1, rows, columns, inner, "", count, copies)
    yield Product(f"{name}, weight gradient", 1, columns, rows, inner, "a", count, copies)


def products(shape: StepShape) -> list[Product]:
    """All matrix products of a step with balanced experts; of attention, what the causal mask leaves."""
    layers, hidden, ffn, experts = shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.num_experts
    tokens, length = shape.micro_batch_size * shape.seq_length, shape.seq_length
    rows, width = tokens * shape.moe_router_topk // experts, hidden // shape.num_attention_heads
    made = [
        *_linear("expert gate and up", rows, hidden, 2 * ffn, layers * experts, experts),
        *_linear("expert down", rows, ffn, hidden, layers * experts, experts),
        *_linear("query, key, value", tokens, hidden, hidden + 2 * shape.num_query_groups * width, layers, layers),
        *_linear("attention output", tokens, hidden, hidden, layers, layers),
        *_linear("router", tokens, hidden, experts, layers, layers),
        *_linear("logits", tokens, hidden, shape.vocab_size, 1, 1),
    ]
    heads = shape.micro_batch_size * shape.num_attention_heads
    timed = min(heads, MOST_HEADS)
    count = 2 * layers * (heads / timed) * (length + 1) / (2 * length)
    made.append(Product("attention, q k^T and dy v^T", timed, length, width, length, "b", count, 2))
    made.append(Product("attention, p v and ds k", timed, length, length, width, "", count, 2))
    made.append(Product("attention, p^T dy and ds^T q", timed, length, length, width, "a", count, 2))
    return made


class Floor:
    """The products of a step and a copy, with their operands, ready to be timed; `flops` are those of all products."""

    def __init__(self, shape: StepShape, parameters: int) -> None:
        self.products = products(shape)
        self.flops = sum(product.flops * product.count for product in self.products)
        self._device = torch.device(shape.device)
        self._operands = [product.operands(shape.dtype, self._device) for product in self.products]
        self._source = torch.ones(COPY_ELEMENTS, device=self._device)
        self._target = torch.empty_like(self._source)
        # gradient read; master and two moments read and written; a narrow weight written
        self.optimizer_bytes = parameters * (4 + 24 + (0 if shape.dtype == torch.float32 else shape.dtype.itemsize))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds_of_products(self) -> list[float]:
        """Seconds of one of each product."""
        taken = []
        for operands in self._operands:
            start = self._now()
            for a, b, out in operands:
                torch.matmul(a, b, out=out)
            taken.append((self._now() - start) / len(operands))
        return taken

    def seconds_of_optimizer(self) -> float:
        """Seconds that the optimizer's bytes take at the rate of a copy, the fastest of three."""
        taken = []
        for _ in range(3):
            start = self._now()
            self._target.copy_(self._source)
            taken.append(self._now() - start)
        return min(taken) * self.optimizer_bytes / (2 * self._source.nbytes)
