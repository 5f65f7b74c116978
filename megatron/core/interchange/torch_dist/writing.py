"""The `.metadata` of a distributed checkpoint, written without torch."""

from collections.abc import Mapping

from megatron.core.interchange.torch_dist.metadata import Chunk, Place, SavedTensor
from megatron.core.interchange.torch_pickle import Call, Instance, Named, write_pickle

_METADATA = "torch.distributed.checkpoint.metadata"


def encode_metadata(tensors: Mapping[str, SavedTensor], objects: Mapping[str, Place]) -> bytes:
    """The file's content, for torch 2.3 and later."""
    saved: dict[object, object] = {key: _tensor(tensor) for key, tensor in tensors.items()}
    saved |= {key: _instance("BytesStorageMetadata", None) for key in objects}
    stored: dict[object, object] = {_index(key): _info(place) for key, place in objects.items()}
    for key, tensor in tensors.items():
        stored |= {_index(key, chunk, number): _info(chunk.place) for number, chunk in enumerate(tensor.chunks)}
    content = {
        "state_dict_metadata": saved, "planner_data": None, "storage_data": stored, "storage_meta": None,
        "version": None,
    }  # fmt: skip
    return write_pickle(_instance("Metadata", content))


def _instance(kind: str, state: object, module: str = _METADATA) -> Instance:
    # without fields the state must not be None, which torch's own unpickler passes on
    return Instance(Named(module, kind), {} if state is None else state)


def _size(shape: tuple[int, ...]) -> Call:
    return Call(Named("torch", "Size"), (shape,))


def _tensor(tensor: SavedTensor) -> Instance:
    layout = Call(Named("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Call(Named(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    properties = (Named("torch", tensor.dtype), layout, False, memory_format, False)
    chunks = [
        _instance("ChunkStorageMetadata", {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)})
        for chunk in tensor.chunks
    ]
    state = {"properties": _instance("TensorProperties", properties), "size": _size(tensor.shape), "chunks": chunks}
    return _instance("TensorStorageMetadata", state)


def _index(key: str, chunk: Chunk | None = None, number: int | None = None) -> Instance:
    offset = None if chunk is None else _size(chunk.offsets)
    return _instance("MetadataIndex", {"fqn": key, "offset": offset, "index": number})


def _info(place: Place) -> Instance:
    state = {
        "relative_path": place.file, "offset": place.offset, "length": place.length, "transform_descriptors": None,
    }  # fmt: skip
    return _instance("_StorageInfo", state, "torch.distributed.checkpoint.filesystem")
