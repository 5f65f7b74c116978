"""The C++ extension as a whole: whether it is there, which instruction set, and that threads change no bit."""

import shutil

import pytest
import torch
from torch import Tensor

from megatron.core.fusions.kernels.cpu import sources, wrapper


def test_one_of_other_sources_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrapper.kernels_cpp is not None and sources.checksum() == wrapper.kernels_cpp.SOURCES
    monkeypatch.setattr(wrapper, "checksum", lambda: "another")
    extension, reason = wrapper._load()
    assert extension is None and "install the package again" in reason


@pytest.mark.parametrize("name", ["module.cpp", "products.h", "wrapper.py"])
def test_the_version_depends_on_every_source(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cpu"
    shutil.copytree(sources.Path(sources.__file__).parent, folder)
    monkeypatch.setattr(sources, "__file__", str(folder / "sources.py"))
    before = sources.checksum()
    with (folder / name).open("a") as file:
        file.write("\n")
    assert sources.checksum() != before


def test_a_set_that_is_not_there_is_refused() -> None:
    assert wrapper.kernels_cpp is not None
    with pytest.raises(ValueError, match="no instruction set sse9"):
        wrapper.kernels_cpp.choose_instruction_set("sse9")


def test_the_number_of_threads_changes_no_bit(instruction_set: str) -> None:
    x, weight, logits = torch.randn(500, 96), torch.randn(96), torch.randn(500, 333)
    ids, query, probs = torch.randint(333, (500,)), torch.randn(2, 4, 200, 16), torch.rand(500)

    def everything() -> list[Tensor]:
        y, inverse_rms = wrapper.rms_norm_forward(x, weight, 1e-5)
        out, logsumexp = wrapper.attention_forward(query, query, query)
        squares = torch.empty(96, 96)
        wrapper.multiply_(x.t(), y, squares, 0.0)
        narrow = torch.zeros(500, 500)
        if instruction_set == "amx":
            wrapper.multiply_(x.bfloat16(), y.bfloat16().t(), narrow, 0.0)
        softmax = logits.clone()
        return [
            y, squares, narrow, out, softmax, *wrapper.rms_norm_backward(x, y, weight, inverse_rms),
            *wrapper.attention_backward(query, query, query, query, out, logsumexp),
            *wrapper.softmax_statistics_(softmax, ids, 333), *wrapper.swiglu_backward(x, torch.cat((x, y), 1), probs),
        ]  # fmt: skip

    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
