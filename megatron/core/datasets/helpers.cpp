// Index builders of the GPT and blended data sets; helpers.py holds the NumPy twin they are tested against.

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Positions and offsets of every seq_length-th token of the documents laid end to end, as rows of [samples + 1, 2].
template <typename Index>
static Array<Index> sample_index(const Array<int32_t> &sequence_lengths, const Array<int32_t> &document_index,
                                 int64_t seq_length, int64_t samples) {
    const auto lengths = sequence_lengths.unchecked<1>();
    const auto documents = document_index.unchecked<1>();
    Array<Index> result({static_cast<py::ssize_t>(samples + 1), static_cast<py::ssize_t>(2)});
    auto rows = result.template mutable_unchecked<2>();
    const py::ssize_t count = documents.shape(0);
    py::gil_scoped_release release;
    py::ssize_t position = 0;
    int64_t offset = 0;
    for (int64_t row = 0; row <= samples; ++row) {
        while (position < count && offset >= lengths(documents(position))) {
            offset -= lengths(documents(position));
            ++position;
        }
        if (position == count) {
            throw std::invalid_argument("the documents hold fewer tokens than num_epochs * tokens_per_epoch");
        }
        rows(row, 0) = static_cast<Index>(position);
        rows(row, 1) = static_cast<Index>(offset);
        offset += seq_length;
    }
    return result;
}

static py::array build_sample_index(const Array<int32_t> &sequence_lengths, const Array<int32_t> &document_index,
                                    int64_t seq_length, int64_t num_epochs, int64_t tokens_per_epoch) {
    const int64_t samples = (num_epochs * tokens_per_epoch - 1) / seq_length;
    if (document_index.size() > std::numeric_limits<int32_t>::max()) {
        return sample_index<int64_t>(sequence_lengths, document_index, seq_length, samples);
    }
    return sample_index<int32_t>(sequence_lengths, document_index, seq_length, samples);
}

static py::tuple build_blending_indices(const Array<double> &weights, int64_t num_samples) {
    const auto weight = weights.unchecked<1>();
    const py::ssize_t sources = weight.shape(0);
    Array<int16_t> source_of_sample(num_samples);
    Array<int64_t> sample_of_source(num_samples);
    auto chosen = source_of_sample.mutable_unchecked<1>();
    auto within = sample_of_source.mutable_unchecked<1>();
    {
        py::gil_scoped_release release;
        std::vector<int64_t> counts(sources, 0);
        for (int64_t sample = 0; sample < num_samples; ++sample) {
            py::ssize_t best = -1;
            double earliest = std::numeric_limits<double>::infinity();
            for (py::ssize_t source = 0; source < sources; ++source) {
                if (static_cast<double>(counts[source]) < weight(source) * static_cast<double>(sample + 1)) {
                    const double deadline = static_cast<double>(counts[source] + 1) / weight(source);
                    if (deadline < earliest) {
                        earliest = deadline;
                        best = source;
                    }
                }
            }
            if (best < 0) {
                throw std::invalid_argument("blend weights must be positive numbers that sum to one");
            }
            chosen(sample) = static_cast<int16_t>(best);
            within(sample) = counts[best]++;
        }
    }
    return py::make_tuple(source_of_sample, sample_of_source);
}

PYBIND11_MODULE(helpers_cpp, module) {
    module.def("build_sample_index", &build_sample_index, py::arg("sequence_lengths").noconvert(),
               py::arg("document_index").noconvert(), py::arg("seq_length"), py::arg("num_epochs"),
               py::arg("tokens_per_epoch"));
    module.def("build_blending_indices", &build_blending_indices, py::arg("weights").noconvert(),
               py::arg("num_samples"));
}
