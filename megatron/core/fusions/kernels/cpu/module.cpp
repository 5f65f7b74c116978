// The operations of megatron.core.fusions for CPUs, compiled for several instruction sets: the best that the processor
// has is taken when the module is loaded. Tensors come as addresses, shapes and strides, so that torch is not needed to
// build this; wrapper.py next to this file checks them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <array>
#include <tuple>

#include "parallel.h"
#include "types.h"

// GCC compiles what lies between push and pop for these instructions; other compilers get the plain set alone.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_WIDE_SETS 1
#define HAS_TILES (__GNUC__ >= 11)  // AMX needs GCC 11
#if HAS_TILES
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own intrinsics
namespace native::amx {
constexpr int WIDTH = 16, ROWS = 6, VECTORS = 4;
template <class T>
using Element = T;  // operand type of the attention products for tensors of type T
#include "elementwise.h"
#include "adamw.h"
#include "products.h"
#include "tile_products.h"
#include "attention.h"
}  // namespace native::amx
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace native::avx512 {
constexpr int WIDTH = 16, ROWS = 6, VECTORS = 4;  // 24 of 32 registers hold sums
template <class T>
using Element = float;
#include "elementwise.h"
#include "adamw.h"
#include "products.h"
#include "attention.h"
}  // namespace native::avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace native::avx2 {
constexpr int WIDTH = 8, ROWS = 6, VECTORS = 2;  // 12 of 16
template <class T>
using Element = float;
#include "elementwise.h"
#include "adamw.h"
#include "products.h"
#include "attention.h"
}  // namespace native::avx2
#pragma GCC pop_options
#else
#define HAS_WIDE_SETS 0
#define HAS_TILES 0
#endif
namespace native::plain {
constexpr int WIDTH = 4, ROWS = 4, VECTORS = 2;
template <class T>
using Element = float;
#include "elementwise.h"
#include "adamw.h"
#include "products.h"
#include "attention.h"
}  // namespace native::plain

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

#if HAS_TILES
// Whether there are tile registers and the system lets this process have them.
bool may_use_tiles() {
    constexpr long REQUEST_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of arch_prctl(2)
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
           __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0;
}
#endif

const std::vector<std::string>& instruction_sets() {
    static const auto found = [] {
        std::vector<std::string> sets;
#if HAS_WIDE_SETS
        __builtin_cpu_init();
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if HAS_TILES
        if (wide && may_use_tiles()) sets.push_back("amx");
#endif
        if (wide) sets.push_back("avx512");
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back("avx2");
#endif
        sets.push_back("plain");
        return sets;
    }();
    return found;
}

std::string& chosen() {
    static std::string set = instruction_sets().front();
    return set;
}

// Calls the function of that name that was compiled for the chosen set.
#if HAS_TILES
#define CALL_TILED(function, ...) \
    if (chosen() == "amx") return native::amx::function(__VA_ARGS__);
#else
#define CALL_TILED(function, ...)
#endif
#if HAS_WIDE_SETS
#define CALL(function, ...)                                                  \
    [&] {                                                                    \
        py::gil_scoped_release others_may_run;                               \
        CALL_TILED(function, __VA_ARGS__)                                    \
        if (chosen() == "avx512") return native::avx512::function(__VA_ARGS__); \
        if (chosen() == "avx2") return native::avx2::function(__VA_ARGS__);  \
        return native::plain::function(__VA_ARGS__);                         \
    }()
#else
#define CALL(function, ...)                          \
    [&] {                                            \
        py::gil_scoped_release others_may_run;       \
        return native::plain::function(__VA_ARGS__); \
    }()
#endif

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Storage, data, exponents, weights, positive; see native::Stored.
using StoredArguments = std::tuple<int, Address, Address, Address, bool>;

native::Stored stored(const StoredArguments& given) {
    const auto& [storage, data, exponents, weights, positive] = given;
    return {static_cast<native::Storage>(storage), at<void>(data), at<std::uint8_t>(exponents),
            at<native::BFloat16>(weights), positive};
}

// `weights` is 0 where the masters are the weights, or hold them.
void adamw(const StoredArguments& master, const StoredArguments& exp_avg, const StoredArguments& exp_avg_sq,
           const StoredArguments& grad, Address weights, long count, const std::array<double, 7>& numbers,
           int threads) {
    const native::AdamW step{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]};
    CALL(adamw, stored(master), stored(exp_avg), stored(exp_avg_sq), stored(grad), at<native::BFloat16>(weights),
         count, step, threads);
}

using Sizes = std::array<long, 5>;  // batch, heads, groups, length, width
using Strides = std::array<std::array<long, 3>, 5>;  // of query, key, value, out and its gradient

native::AttentionShape attention_shape(const Sizes& sizes, const Strides& strides) {
    const auto at = [&](int tensor) {
        return native::HeadStrides{strides[tensor][0], strides[tensor][1], strides[tensor][2]};
    };
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], at(0), at(1), at(2), at(3), at(4)};
}

// Operations whose tensors have elements of type T, under names that end in `suffix`.
template <class T>
void define(py::module_& module, const std::string& suffix) {
    const auto name = [&](const char* operation) { return operation + suffix; };
    module.def(name("swiglu_").c_str(),
               [](Address gate_up, Address probs, Address y, long rows, long width, int threads) {
                   CALL(swiglu, at<T>(gate_up), at<float>(probs), at<T>(y), rows, width, threads);
               });
    module.def(name("swiglu_backward_").c_str(),
               [](Address grad, Address gate_up, Address probs, Address grad_gate_up, Address grad_probs, Address y,
                  long rows, long width, int threads) {
                   CALL(swiglu_backward, at<T>(grad), at<T>(gate_up), at<float>(probs), at<T>(grad_gate_up),
                        at<float>(grad_probs), at<T>(y), rows, width, threads);
               });
    module.def(name("gather_").c_str(),
               [](Address x, Address pairs, Address y, long rows, long width, long top_k, int threads) {
                   CALL(gather, at<T>(x), at<std::int64_t>(pairs), at<T>(y), rows, width, top_k, threads);
               });
    module.def(name("combine_").c_str(),
               [](Address y, Address rows_TK, Address x, long tokens, long width, long top_k, int threads) {
                   CALL(combine, at<T>(y), at<std::int64_t>(rows_TK), at<T>(x), tokens, width, top_k, threads);
               });
    module.def(name("rms_norm_").c_str(), [](Address x, Address weight, Address y, Address inverse_rms, long rows,
                                             long width, float epsilon, int threads) {
        CALL(rms_norm, at<T>(x), at<T>(weight), at<T>(y), at<float>(inverse_rms), rows, width, epsilon, threads);
    });
    module.def(name("rms_norm_backward_").c_str(),
               [](Address grad, Address x, Address weight, Address inverse_rms, Address grad_x, Address partial,
                  long rows, long width, long piece_rows, int threads) {
                   CALL(rms_norm_backward, at<T>(grad), at<T>(x), at<T>(weight), at<float>(inverse_rms),
                        at<T>(grad_x), at<float>(partial), rows, width, piece_rows, threads);
               });
    module.def(name("softmax_statistics_").c_str(),
               [](Address logits, Address ids, Address largest, Address total, Address target, long rows, long stride,
                  long columns, int threads) {
                   CALL(softmax_statistics, at<T>(logits), at<std::int64_t>(ids), at<float>(largest),
                        at<float>(total), at<float>(target), rows, stride, columns, threads);
               });
    module.def(name("softmax_gradient_").c_str(),
               [](Address softmax, Address own_logsumexp, Address ids, Address logsumexp, Address grad, long rows,
                  long width, long columns, int threads) {
                   CALL(softmax_gradient, at<T>(softmax), at<float>(own_logsumexp), at<std::int64_t>(ids),
                        at<float>(logsumexp), at<float>(grad), rows, width, columns, threads);
               });
    module.def(name("attention_").c_str(),
               [](Address query, Address key, Address value, Address out, Address logsumexp, const Sizes& sizes,
                  const Strides& strides, int threads) {
                   const auto shape = attention_shape(sizes, strides);
                   CALL(attention, at<T>(query), at<T>(key), at<T>(value), at<T>(out), at<float>(logsumexp), shape,
                        threads);
               });
    module.def(name("attention_backward_").c_str(),
               [](Address grad, Address query, Address key, Address value, Address out, Address logsumexp,
                  Address grad_query, Address grad_key, Address grad_value, const Sizes& sizes, const Strides& strides,
                  int threads) {
                   const auto shape = attention_shape(sizes, strides);
                   CALL(attention_backward, at<T>(grad), at<T>(query), at<T>(key), at<T>(value), at<T>(out),
                        at<float>(logsumexp), at<T>(grad_query), at<float>(grad_key), at<float>(grad_value), shape,
                        threads);
               });
    module.def(name("rotary_").c_str(),
               [](Address x, Address cos, Address sin, Address y, const std::array<long, 4>& shape,
                  const std::array<long, 3>& strides, long table_stride, float direction, int threads) {
                   CALL(rotary, at<T>(x), at<float>(cos), at<float>(sin), at<T>(y), shape[0], shape[1], shape[2],
                        shape[3], strides.data(), table_stride, direction, threads);
               });
}

// a and b: address, row stride, column stride; c: address, row stride; rows, inner, columns; beta.
using ProductArguments = std::tuple<std::tuple<Address, long, long>, std::tuple<Address, long, long>,
                                    std::tuple<Address, long>, std::tuple<long, long, long>, float>;

template <class T, class Out>
std::vector<native::Product<T, Out>> products(const std::vector<ProductArguments>& wanted) {
    const auto operand = [](const std::tuple<Address, long, long>& given) {
        return native::Operand<T>{at<T>(std::get<0>(given)), std::get<1>(given), std::get<2>(given)};
    };
    std::vector<native::Product<T, Out>> all;
    for (const auto& [a, b, c, shape, beta] : wanted) {
        const auto [rows, inner, columns] = shape;
        all.push_back({operand(a), operand(b), at<Out>(std::get<0>(c)), std::get<1>(c), rows, inner, columns, beta});
    }
    return all;
}

void multiply(const std::vector<ProductArguments>& wanted, int threads) {
    CALL(multiply, (products<float, float>(wanted)), threads);
}

template <class Out>
void multiply_tiled([[maybe_unused]] const std::vector<ProductArguments>& wanted, [[maybe_unused]] int threads) {
    if (chosen() != "amx") throw std::runtime_error("products of bfloat16 need the instruction set amx");
#if HAS_TILES
    const auto all = products<native::BFloat16, Out>(wanted);
    py::gil_scoped_release others_may_run;
    native::amx::multiply_tiled(all, threads);
#endif
}

}  // namespace

PYBIND11_MODULE(kernels_cpp, module) {
    module.doc() = "Operations of megatron.core.fusions for CPUs; see wrapper.py.";
    module.attr("SOURCES") = SOURCES;
    define<float>(module, "float32");
    define<native::BFloat16>(module, "bfloat16");
    module.def("adamw", &adamw);
    module.def("multiply_float32_float32", &multiply);
    module.def("multiply_bfloat16_float32", &multiply_tiled<float>);
    module.def("multiply_bfloat16_bfloat16", &multiply_tiled<native::BFloat16>);
    module.def("shares_threads", [] { return native::torch_parallel() != nullptr; },
               "Whether torch's threads were found.");
    module.def("instruction_set", &chosen, "The one that is used.");
    module.def("instruction_sets", &instruction_sets, "Those compiled here that this processor has, best first.");
    module.def("choose_instruction_set", [](const std::string& set) {
        const auto& sets = instruction_sets();
        if (std::find(sets.begin(), sets.end(), set) == sets.end())
            throw py::value_error("this processor, or this build, has no instruction set " + set);
        chosen() = set;
    });
}
