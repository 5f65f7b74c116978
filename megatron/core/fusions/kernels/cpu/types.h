// What the kernels of every instruction set take.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace native {

struct BFloat16 {
    std::uint16_t bits;
};

inline float bits_to_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline std::uint32_t float_to_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// A matrix; strides in elements.
template <class T>
struct Operand {
    const T* data;
    long row_stride, column_stride;

    Operand from(long row, long column) const {
        return {data + row * row_stride + column * column_stride, row_stride, column_stride};
    }
    Operand transposed() const { return {data, column_stride, row_stride}; }
};

// C = beta * C + A B, with A [rows, inner] and B [inner, columns]; with beta = 0, C is not read, so a NaN
// in it does not propagate. In bfloat16 one stride of A and one of B must be 1.
template <class T, class Out>
struct Product {
    Operand<T> a, b;
    Out* c;
    long c_stride, rows, inner, columns;
    float beta;
};

// Where the vectors of [batch, heads, length, width] lie; strides in elements, 1 within a vector.
struct HeadStrides {
    long sample, head, position;

    template <class T>
    T* row(T* data, long b, long h, long s) const {
        return data + b * sample + h * head + s * position;
    }
};

struct AttentionShape {
    long batch, heads, groups, length, width;
    HeadStrides query, key, value, out, grad;
};

// The numbers of one update of AdamW.
struct AdamW {
    double number, learning_rate, beta1, beta2, epsilon, weight_decay, factor;
};

// How the numbers of an optimizer's state lie in memory: see megatron/core/fusions/stored.py, which has the formulas.
enum class Storage { FLOAT32, BFLOAT16, FLOAT16, FLOAT8, REMAINDER };

struct Stored {
    Storage storage;
    void* data;
    std::uint8_t* exponents;  // of scaled numbers, one a block
    BFloat16* weights;        // the upper halves, of which the data are the remainders
    bool positive;            // scaled numbers above zero stay above zero
};

// Memory that a thread keeps for its next task.
class Buffer {
public:
    float* floats(long count) {
        if (count > size_) {
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
            if (!memory_) throw std::bad_alloc();
            size_ = count;
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    long size_ = 0;
};

}  // namespace native
