"""How evenly the tokens of a step were shared out among experts."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class ExpertLoad(NamedTuple):
    """The load of one layer, or of all of them."""

    largest: float
    """Load of the busiest expert, in even shares: between 1 and the number of experts (divided by top-k)."""
    entropy: float
    """Entropy of the shares (the mean over layers) divided by that of even ones: between 0 and 1."""
    dead: int
    """Experts that no token chose."""


def layer_load(tokens_per_expert: Sequence[int]) -> ExpertLoad:
    """The load of one layer, from how often each of its experts was chosen."""
    total, experts = max(1, sum(tokens_per_expert)), len(tokens_per_expert)
    shares = [count / total for count in tokens_per_expert if count]
    entropy = -sum(share * math.log(share) for share in shares)
    even = math.log(experts) if experts > 1 else 1.0
    return ExpertLoad(max(tokens_per_expert) * experts / total, entropy / even, experts - len(shares))


def model_load(tokens_per_expert: Sequence[Sequence[int]]) -> ExpertLoad:
    """The load of all layers: the largest of the busiest, the mean entropy, the number of dead experts."""
    layers = [layer_load(counts) for counts in tokens_per_expert]
    return ExpertLoad(
        max(layer.largest for layer in layers),
        sum(layer.entropy for layer in layers) / len(layers),
        sum(layer.dead for layer in layers),
    )
