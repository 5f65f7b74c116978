"""Interleaved pipelines need whole rounds of microbatches, also while the batch grows."""

import pytest
import torch
from model_testing import tiny_arguments

import pretrain_gpt
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.training.setup import build_trainer

INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}


@pytest.mark.parametrize(
    "settings",
    [{"global_batch_size": 6}, {"global_batch_size": 8, "rampup_batch_size": (2, 2, 100)}],
    ids=["batch", "growing batch"],
)
def test_a_step_with_an_incomplete_round_is_refused(settings: dict[str, object]) -> None:
    arguments = tiny_arguments(settings={**INTERLEAVED, **settings})
    groups = ProcessGroups(pp=Group((0, 1), 0))
    with pytest.raises(ValueError, match=r"multiple of --pipeline-model-parallel-size \(2\) microbatches in a step"):
        build_trainer(arguments, groups, torch.device("cpu"), pretrain_gpt.model_provider, pretrain_gpt.forward_step)
