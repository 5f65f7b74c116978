"""How the layers of a model are divided over pipeline stages."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A part of the model that runs in one piece: consecutive layers, and what comes before and after all layers."""

    layers: range
    """Numbers of its layers in the whole model."""
    has_embedding: bool
    """Whether it turns tokens into hidden states."""
    has_output: bool
    """Whether it ends with the final norm and the output layer."""


def whole_model(num_layers: int) -> Stage:
    """The one stage of a model that is not divided."""
    return Stage(range(num_layers), has_embedding=True, has_output=True)


def divide_layers(
    num_layers: int, ranks: int, chunks: int = 1, first: int | None = None, last: int | None = None
) -> tuple[tuple[Stage, ...], ...]:
    """The stages of each pipeline rank, in the order in which a microbatch visits them there.

    A microbatch passes chunk 0 of every rank, then chunk 1 of every rank, and so on (arXiv:2104.04473, section 2.2).
    `first` and `last` are the layers on the first and the last rank, in all their chunks together; an equal share if
    not given. Raises ValueError if the layers cannot be divided so.
    """
    counts = _layers_per_rank(num_layers, ranks, first, last)
    for count in counts:
        if count % chunks:
            raise ValueError(
                f"a pipeline rank's {count} layers are not divisible by its {chunks} virtual stages: change "
                "--num-virtual-stages-per-pipeline-rank (or --num-layers-per-virtual-pipeline-stage), or the number "
                "of layers of that rank"
            )
    stages: list[list[Stage]] = [[] for _ in range(ranks)]
    start = 0
    for chunk in range(chunks):
        for rank, count in enumerate(counts):
            layers = range(start, start + count // chunks)
            start = layers.stop
            stages[rank].append(
                Stage(layers, has_embedding=not layers.start, has_output=chunk == chunks - 1 and rank == ranks - 1)
            )
    return tuple(tuple(own) for own in stages)


def _layers_per_rank(num_layers: int, ranks: int, first: int | None, last: int | None) -> list[int]:
    if first is None and last is None:
        if num_layers % ranks:
            raise ValueError(
                f"--num-layers ({num_layers}) is not divisible by --pipeline-model-parallel-size ({ranks}): change one "
                "of them, or give --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers"
            )
        return [num_layers // ranks] * ranks
    uneven = [(0, first, "first"), (ranks - 1, last, "last")]
    flags = " and ".join(f"--decoder-{name}-pipeline-num-layers {n}" for _, n, name in uneven if n is not None)
    if ranks == 1 or (ranks == 2 and first is not None and last is not None and first + last != num_layers):
        raise ValueError(
            f"{flags}: the {ranks} pipeline stage(s) must hold all {num_layers} layers together; give one of the two "
            "flags only, or a larger --pipeline-model-parallel-size"
        )
    others = ranks - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    if rest < others or (others and rest % others):
        raise ValueError(
            f"{flags} leave{'s' if ' and ' not in flags else ''} {rest} of {num_layers} layers for the other {others} "
            f"pipeline stage(s), which is not a positive multiple of {others}: change the flags or the pipeline size"
        )
    counts = [rest // others if others else 0] * ranks
    for rank, count, _ in uneven:
        if count is not None:
            counts[rank] = count
    return counts
