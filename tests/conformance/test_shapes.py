"""What runs on torch's meta device makes tensors like those of the formulas: the dry run counts them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance_testing import only
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron.core.fusions import attention, attention_block, cross_entropy, embedding, forms, linear, permute, rms_norm
from megatron.core.fusions import rotary as rotary_file
from megatron.core.fusions import swiglu as swiglu_file
from megatron.core.fusions.kernels.library import meta

BF16, FP32 = torch.bfloat16, torch.float32
# T tokens, K experts a token, E experts, R rows, H hidden, F width, V vocabulary
T, K, E, H, F, V = 12, 2, 4, 16, 24, 40
R = T * K


def _new(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def _ints(*shape: int, below: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % below


def _ends() -> Tensor:
    return (torch.arange(1, E + 1) * (R // E)).to(torch.int32)


def _heads(heads: int) -> Tensor:
    return _new(2, heads, 6, 8)


# The operation and its operands.
OPERANDS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "rms_norm_forward": (rms_norm.rms_norm_forward, (_new(T, 1, H), _new(H), 1e-5)),
    "rms_norm_backward": (
        rms_norm.rms_norm_backward,
        (_new(T, 1, H), _new(T, 1, H), _new(H), _new(T, 1, 1, dtype=FP32)),
    ),
    "rotate": (rotary_file.rotate, (_heads(4), _new(6, 4, dtype=FP32), _new(6, 4, dtype=FP32), False)),
    "swiglu": (swiglu_file.swiglu, (_new(R, 2 * F), _new(R, dtype=FP32))),
    "swiglu_backward": (swiglu_file.swiglu_backward, (_new(R, F), _new(R, 2 * F), _new(R, dtype=FP32))),
    "sort_pairs": (permute.sort_pairs, (_ints(T, K, below=E + 1), E, R - 3)),
    "gather_pairs": (permute.gather_pairs, (_new(T, H), _ints(R, below=R), K)),
    "combine_pairs": (permute.combine_pairs, (_new(R, H), _ints(T, K, below=R))),
    "softmax_statistics_": (cross_entropy.softmax_statistics_, (_new(T, V), _ints(T, below=V), V)),
    "softmax_gradient_": (
        cross_entropy.softmax_gradient_,
        (_new(T, V), _new(T, dtype=FP32), _ints(T, below=V), _new(T, dtype=FP32), _new(T, dtype=FP32), V),
    ),
    "add_rows_": (embedding.add_rows_, (_new(V, H, dtype=FP32), _ints(T, below=V), _new(T, H, dtype=FP32))),
    "attend": (attention.attend, (_heads(4), _heads(2), _heads(2))),
    "attend_documents": (
        attention.attend_documents,
        (_new(T, 4, 8), _new(T, 2, 8), _new(T, 2, 8), torch.tensor([0, 5, T], dtype=torch.int32), (5, T - 5)),
    ),
    "attention_block": (attention_block.attention_block, (_heads(4), _heads(2), _heads(2), True)),
    "attention_block_backward": (
        attention_block.attention_block_backward,
        (_heads(4), _heads(4), _heads(2), _heads(2), _heads(4), _new(2, 4, 6, dtype=FP32), True),
    ),
    "multiply_": (linear.multiply_, (_new(T, H), _new(H, F), _new(T, F, dtype=FP32), 1.0)),
    "grouped_product": (linear.grouped_product, (_new(R, H), _new(E, F, H), _ends(), True, "auto")),
    "grouped_weight_gradient_": (
        linear.grouped_weight_gradient_,
        (_new(R, F), _new(R, H), _ends(), _new(E, F, H, dtype=FP32), 0.0),
    ),
}
BY_ROUTER = {"route_forward", "route_backward"}  # their formula is not one function


# adamw_ makes no tensors
@pytest.mark.parametrize("name", sorted(name for name in forms.TABLE.keys() - {"adamw_"} if hasattr(meta, name)))
def test_shapes_and_types_are_the_formulas(name: str) -> None:
    if name in BY_ROUTER:
        logits = _new(T, E, dtype=FP32)
        probs, experts, softmax, logsumexp, counts = meta.route_forward(logits.to("meta"), K)
        expected = [_new(T, K, dtype=FP32), _ints(T, K, below=E), logits, logits[:, 0], logits[0]]
        found = [probs, experts, softmax, logsumexp, counts]
        gradient = meta.route_backward(probs, softmax, logsumexp, probs, experts, softmax)
        assert (gradient.shape, gradient.dtype) == (logits.shape, logits.dtype)
    else:
        operation, operands = OPERANDS[name]
        with only("formula"):
            expected = tree_leaves(operation(*operands))
        found = tree_leaves(operation(*tree_map_only(Tensor, lambda tensor: tensor.to("meta"), operands)))
    assert [(t.shape, t.dtype) for t in found if t is not None] == [
        (t.shape, t.dtype) for t in expected if t is not None
    ]


def test_factors_that_do_not_fit_are_refused_without_values() -> None:
    operands = (_new(T, H), _new(F, H), _new(T, H))
    with pytest.raises(AssertionError):
        linear.multiply_(*(tensor.to("meta") for tensor in operands), 0.0)
