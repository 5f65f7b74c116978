"""Whether a checkpoint is of the model, and of the type of parameters, that a run has; refusals if it is not."""

from pathlib import Path
from typing import Any

from megatron.core import interchange
from megatron.training.arguments import SHAPE_FIELDS
from megatron.training.checkpoints.protocol import CheckpointSource
from megatron.training.config import Arguments

# Where the configuration derives a value from another field if it is not given.
_DERIVED = {"num_query_groups": "query_groups", "kv_channels": "head_dim"}


def check_same_model(path: Path, saved_arguments: Any, arguments: Arguments, tp_size: int | None = None) -> None:
    """Raises ValueError, listing the flags, if a checkpoint is of another model than the command line describes.

    The padded vocabulary is compared where `tp_size` is given.
    """
    window = getattr(saved_arguments, "sliding_window", None)
    if window is not None and window < arguments.data.seq_length:
        raise ValueError(
            f"{path}: the model attends to {window} tokens only, which is not supported for --seq-length "
            f"{arguments.data.seq_length}: use at most {window}"
        )
    saved = interchange.model_config_from_args(saved_arguments)
    differences = []
    for field in SHAPE_FIELDS:
        if field == "max_position_embeddings":  # nothing in the weights depends on it
            continue
        name = _DERIVED.get(field, field)
        theirs, ours = getattr(saved, name), getattr(arguments.model, name)
        if theirs is not None and theirs != ours:
            differences.append(f"--{field.replace('_', '-')} {theirs} there, {ours} here")
    if tp_size is not None:
        theirs, ours = getattr(saved_arguments, "padded_vocab_size", None), arguments.model.padded_vocab_size(tp_size)
        if theirs not in (None, ours):
            differences.append(f"vocabulary padded to {theirs} there, {ours} here (--make-vocab-size-divisible-by)")
    if differences:
        raise ValueError(
            f"{path} is a checkpoint of another model: {'; '.join(differences)}. Correct the flags or the "
            "tokenizer, or add --use-checkpoint-args"
        )


def check_same_type(source: CheckpointSource, saved_arguments: Any, arguments: Arguments) -> None:
    """Raises ValueError if the optimizer's state is of a run in another type of parameters than this one."""
    saved, ours = getattr(saved_arguments, "params_dtype", None), arguments.model.params_dtype
    if source.with_optimizer and saved is not None and str(saved).removeprefix("torch.") != ours:
        raise ValueError(
            f"{source.folder} was saved by a run in {saved}, and this one is in {ours} (--bf16, --fp16 or neither; "
            "PRECISION in the example script): take the same, or start from its weights alone with --no-load-optim or "
            "--finetune"
        )


def refuse(path: Path, problems: list[str]) -> None:
    """Raises ValueError, listing the first of them, if there are tensors that do not fit the model."""
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:5])}{more}")
