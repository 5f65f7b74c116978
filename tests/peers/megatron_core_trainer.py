"""A rank of NVIDIA's own package on a CPU: takes steps with its optimizer and saves both as its training does.

Arguments: how the optimizer is sharded (fully_reshardable, dp_reshardable, or none for no distributed optimizer), the
step's folder, the Hugging Face folder that gives the shape, and the tensor- and expert-parallel sizes. MEGATRON_CORE
names the folder that megatron-core is installed in.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_core_peer import build, training_arguments
from torch.overrides import TorchFunctionMode

from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

STEPS = 3


class _Gpu(TorchFunctionMode):
    """Stands for a GPU: what is to be there is on the CPU, and types have the names that its optimizers look for."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return args[0]
        found = function(*args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if function is torch.Tensor.type and len(args) == 1 else found


def main() -> None:
    """One rank."""
    sharding, folder, shape, tp, ep = sys.argv[1:]
    config = json.loads((Path(shape) / "config.json").read_text())
    padded = -(-config["vocab_size"] // 8) * 8
    dist.init_process_group("gloo")
    model = build(config, padded, int(tp), int(ep)).bfloat16()
    distributed = sharding != "none"
    model = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True),
        model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-3, weight_decay=0.1, bf16=True, use_distributed_optimizer=distributed, clip_grad=0.0),
        [model],
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.main_grad.shape, generator=generator))
        optimizer.step()
    metadata = {"distrib_optim_sharding_type": sharding, "chained_optim_avoid_prefix": True}
    metadata = metadata if distributed else {"chained_optim_avoid_prefix": True}
    weights = model.sharded_state_dict(metadata=metadata)
    args = training_arguments(config, padded, int(tp))
    args.params_dtype, args.consumed_train_samples = torch.bfloat16, 8 * STEPS
    state = {
        "model": weights, "args": args, "checkpoint_version": 3.0, "iteration": STEPS, "content_metadata": metadata,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=metadata),
        "opt_param_scheduler": {"num_steps": 8 * STEPS, "max_lr": 1e-3},
    }  # fmt: skip
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, folder, ("torch_dist", 1))
    dist.barrier()


if __name__ == "__main__":  # its writer starts processes, which import this file
    with _Gpu():
        main()
