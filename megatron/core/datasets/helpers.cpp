// Where the samples of an epoch begin; helpers.py holds the NumPy twin that this is tested against.

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

using Array = py::array_t<int32_t, py::array::c_style>;

// Lengths are read in random order: asking for them this many documents ahead hides most of the wait for memory.
constexpr int64_t AHEAD = 16;

// Position and offset of the tokens first, first + seq_length, ... of the documents laid end to end in this order.
static Array sample_starts(const Array &document_lengths, const Array &document_order, int64_t seq_length,
                           int64_t first, int64_t tokens) {
    const int64_t rows = std::max<int64_t>(0, (tokens - first + seq_length - 1) / seq_length);
    Array result({static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(2)});
    const int32_t *lengths = document_lengths.data();
    const int32_t *order = document_order.data();
    const int64_t documents = document_lengths.size(), count = document_order.size();
    int32_t *out = result.mutable_data();
    int32_t *const out_end = out + 2 * rows;
    int64_t begin = 0;
    bool outside = false;
    {
        py::gil_scoped_release release;
        int64_t token = first;
        for (int64_t position = 0; position < count; ++position) {
            const int32_t document = order[position];
            if (document < 0 || document >= documents) {
                outside = true;
                break;
            }
            if (position + AHEAD < count) {
                __builtin_prefetch(lengths + order[position + AHEAD]);
            }
            const int64_t end = begin + lengths[document];
            for (; token < end && out != out_end; token += seq_length) {
                *out++ = static_cast<int32_t>(position);
                *out++ = static_cast<int32_t>(token - begin);
            }
            begin = end;
        }
    }
    if (outside) {
        throw std::invalid_argument("the order names a document that has no length");
    }
    if (out != out_end) {
        throw std::invalid_argument("the documents hold " + std::to_string(begin) + " tokens, fewer than " +
                                    std::to_string(tokens));
    }
    return result;
}

PYBIND11_MODULE(helpers_cpp, module) {
    module.def("sample_starts", &sample_starts, py::arg("document_lengths").noconvert(),
               py::arg("document_order").noconvert(), py::arg("seq_length"), py::arg("first"), py::arg("tokens"));
}
