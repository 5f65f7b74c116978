"""The random states of a rank, by the device whose they are."""

from collections.abc import Mapping

import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """Copies of this rank's; a run on a CPU takes no memory of a GPU that is there."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Sets those of the devices that this rank uses."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if torch.cuda.is_initialized() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
