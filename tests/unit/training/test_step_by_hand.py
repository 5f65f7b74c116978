"""Two steps against AdamW, clipping, schedule and masked loss written out by hand, from command-line flags."""

import math

import torch
from closeness import relative_error
from model_testing import step_batches

import pretrain_gpt
from megatron.core.microbatch import GradientFactors, Microbatch
from megatron.core.parallel_state import ProcessGroups
from megatron.training.arguments import parse_arguments
from megatron.training.progress import Progress
from megatron.training.setup import build_trainer
from megatron.training.training import train_step

FLAGS = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2 "
    "--max-position-embeddings 64 --vocab-size 203 --make-vocab-size-divisible-by 8 --num-experts 4 "
    "--init-method-std 0.2 --moe-aux-loss-coeff 0.1 --params-dtype float64 --seq-length 16 --micro-batch-size 2 "
    "--global-batch-size 8 --train-iters 50 --mock-data --tokenizer-type NullTokenizer --device cpu "
    "--lr 0.01 --min-lr 0.002 --lr-decay-style linear --lr-decay-iters 9 --lr-warmup-iters 4 --lr-warmup-init 0.003 "
    "--adam-beta1 0.8 --adam-beta2 0.95 --adam-eps 1e-3 --clip-grad 0.5 --decoupled-lr 0.02 --decoupled-min-lr 0.005 "
    "--weight-decay-incr-style linear --start-weight-decay 0.1 --end-weight-decay 0.6"
).split()


def learning_rate(iteration: int, highest: float = 0.01, lowest: float = 0.002) -> float:
    """Warm-up over iterations 0-4 from 0.003, linear decay until iteration 9."""
    if iteration < 4:
        return 0.003 + (highest - 0.003) * iteration / 4
    return highest - (highest - lowest) * min(1.0, (iteration - 4) / 5)


def test_steps_equal_the_formulas() -> None:
    arguments, _ = parse_arguments(FLAGS)
    cpu = torch.device("cpu")
    trainer = build_trainer(arguments, ProcessGroups(), cpu, pretrain_gpt.model_provider, pretrain_gpt.forward_step)
    model = pretrain_gpt.model_provider(arguments, ProcessGroups(), cpu)
    (stage,) = trainer.model
    model.load_state_dict(stage.state_dict())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    progress = Progress()
    for step in range(6):
        record, _ = train_step(trainer, iter(step_batches(step, 0, 1)), progress)

        loss = torch.zeros((), dtype=torch.float64)
        for batch in step_batches(step, 0, 1):
            # the model attaches its auxiliary losses at this scale, a quarter for each of four microbatches
            microbatch = Microbatch(labels=batch["labels"], factors=GradientFactors(num_microbatches=4))
            per_token = model(batch["tokens"], microbatch).tensor
            loss = loss + (per_token * batch["loss_mask"]).sum() / batch["loss_mask"].sum() / 4
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        clip = min(1.0, 0.5 / (norm + 1e-6))
        rate = learning_rate(step)
        for name, parameter in model.named_parameters():
            gradient = gradients[name] * clip
            first, second = moments[name]
            first.mul_(0.8).add_(0.2 * gradient)
            second.mul_(0.95).add_(0.05 * gradient.square())
            corrected = first / (1 - 0.8 ** (step + 1))
            denominator = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-3
            decay = 0.0 if name.endswith("layernorm.weight") else 0.1 + 0.5 * step / 50
            own = learning_rate(step, 0.02, 0.005) if "embedding" in name or "output_layer" in name else rate
            parameter.data.mul_(1 - own * decay).sub_(own * corrected / denominator)
        assert math.isclose(record.averages.lm_loss, loss.item(), rel_tol=1e-10)
        assert math.isclose(record.grad_norm, norm, rel_tol=1e-10) and norm > 0.5
        assert math.isclose(record.learning_rate, rate, rel_tol=1e-12)
        for name, parameter in stage.named_parameters():
            expected = dict(model.named_parameters())[name]
            assert relative_error(parameter, expected) <= 1e-10, (step, name)
