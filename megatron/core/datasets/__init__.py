"""Token files, training samples, blends and the order they are read in."""

from megatron.core.datasets.blended_dataset import (
    BlendRow,
    blend_summary,
    build_train_valid_test_datasets,
    fingerprints,
    source_table,
)
from megatron.core.datasets.gpt_dataset import Dataset, Sample
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter
from megatron.core.datasets.sampler import PretrainingSampler

__all__ = [
    "BlendRow",
    "Dataset",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "PretrainingSampler",
    "Sample",
    "blend_summary",
    "build_train_valid_test_datasets",
    "fingerprints",
    "source_table",
]
