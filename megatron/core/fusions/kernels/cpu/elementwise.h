// All operations other than matrix products, for one instruction set; included once for each, inside its namespace.
//
// Elements are float32 or bfloat16 in memory and float32 in between. Every sum has one order, whatever the number of
// threads: rows are summed by themselves, and sums over rows are made of pieces of a fixed size.

constexpr long PIECE = 1 << 14;  // elements of a task: some hundred kilobytes, within a core's second-level cache

#define SIMD _Pragma("omp simd")

inline float load(const float* p) { return *p; }
inline void store(float* p, float x) { *p = x; }
inline float load(const BFloat16* p) { return bits_to_float(static_cast<std::uint32_t>(p->bits) << 16); }
inline void store(BFloat16* p, float x) {
    const std::uint32_t bits = float_to_bits(x);
    const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    p->bits = static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// x = n ln 2 + r, and exp(r) by the polynomial of Cephes' expf; 0 below -87, infinite above 88, NaN stays NaN.
inline float exponential(float x) {
    constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    const float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shifted = bounded * 1.44269504088896341f + TO_INTEGER;
    const float n = shifted - TO_INTEGER;
    const float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const std::uint32_t integer = float_to_bits(shifted) - float_to_bits(TO_INTEGER);
    y *= bits_to_float((integer + 127) << 23);  // 2^n
    return x < -87.0f ? 0.0f : x > 88.0f ? INFINITY : y;
}

// exponentials = exp(scale (x - the largest x)), which may alias x; also the largest x and their sum.
template <class T>
inline void softmax_parts(const T* x, float* exponentials, long count, float scale, float& largest, float& total) {
    float most = -INFINITY, sum = 0.0f;
    _Pragma("omp simd reduction(max : most)") for (long i = 0; i < count; i++) {
        most = load(x + i) > most ? load(x + i) : most;
    }
    _Pragma("omp simd reduction(+ : sum)") for (long i = 0; i < count; i++) {
        exponentials[i] = exponential((load(x + i) - most) * scale);
        sum += exponentials[i];
    }
    largest = most;
    total = sum;
}

template <class T>
void swiglu(const T* gate_up, const float* probs, T* y, long rows, long width, int threads) {
    for_each_piece(rows, width, PIECE, threads, [=](long begin, long end) {
        for (long row = begin; row < end; row++) {
            const T *gate = gate_up + 2 * width * row, *up = gate + width;
            T* out = y + width * row;
            const float p = probs[row];
            SIMD for (long i = 0; i < width; i++) {
                const float g = load(gate + i);
                store(out + i, g / (1.0f + exponential(-g)) * load(up + i) * p);
            }
        }
    });
}

template <class T>
void swiglu_backward(const T* grad, const T* gate_up, const float* probs, T* grad_gate_up, float* grad_probs, T* y,
                     long rows, long width, int threads) {
    for_each_piece(rows, width, PIECE, threads, [=](long begin, long end) {
        for (long row = begin; row < end; row++) {
            const T *gate = gate_up + 2 * width * row, *up = gate + width, *upstream = grad + width * row;
            T *grad_gate = grad_gate_up + 2 * width * row, *grad_up = grad_gate + width, *out = y + width * row;
            const float p = probs[row];
            float grad_p = 0.0f;
            _Pragma("omp simd reduction(+ : grad_p)") for (long i = 0; i < width; i++) {
                const float g = load(gate + i), u = load(up + i), d = load(upstream + i);
                const float sigmoid = 1.0f / (1.0f + exponential(-g));
                const float silu = g * sigmoid;
                grad_p += d * silu * u;
                store(out + i, silu * u * p);
                store(grad_up + i, d * p * silu);
                store(grad_gate + i, d * p * u * (sigmoid + silu * (1.0f - sigmoid)));
            }
            grad_probs[row] = grad_p;
        }
    });
}

// Row r of y is token pairs[r] / top_k of x, or zero if pairs[r] is negative.
template <class T>
void gather(const T* x, const std::int64_t* pairs, T* y, long rows, long width, long top_k, int threads) {
    for_each_piece(rows, width, PIECE, threads, [=](long begin, long end) {
        for (long row = begin; row < end; row++) {
            T* out = y + width * row;
            if (pairs[row] < 0)
                std::memset(static_cast<void*>(out), 0, width * sizeof(T));
            else
                std::memcpy(static_cast<void*>(out), x + pairs[row] / top_k * width, width * sizeof(T));
        }
    });
}

// Row t of x is the sum of the rows rows_TK[t] of y; negative indices are skipped.
template <class T>
void combine(const T* y, const std::int64_t* rows_TK, T* x, long tokens, long width, long top_k, int threads) {
    for_each_piece(tokens, width, PIECE, threads, [=](long begin, long end) {
        static thread_local Buffer buffer;
        float* total = buffer.floats(width);
        for (long token = begin; token < end; token++) {
            std::fill(total, total + width, 0.0f);
            for (long k = 0; k < top_k; k++) {
                const long row = rows_TK[token * top_k + k];
                if (row < 0) continue;
                const T* part = y + row * width;
                SIMD for (long i = 0; i < width; i++) total[i] += load(part + i);
            }
            T* out = x + token * width;
            SIMD for (long i = 0; i < width; i++) store(out + i, total[i]);
        }
    });
}

template <class T>
void rms_norm(const T* x, const T* weight, T* y, float* inverse_rms, long rows, long width, float epsilon,
              int threads) {
    for_each_piece(rows, width, PIECE, threads, [=](long begin, long end) {
        for (long row = begin; row < end; row++) {
            const T* in = x + row * width;
            T* out = y + row * width;
            float squares = 0.0f;
            _Pragma("omp simd reduction(+ : squares)") for (long i = 0; i < width; i++) {
                squares += load(in + i) * load(in + i);
            }
            const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + epsilon);
            inverse_rms[row] = scale;
            SIMD for (long i = 0; i < width; i++) {
                T normalized;  // rounded before it is multiplied, as transformers does
                store(&normalized, load(in + i) * scale);
                store(out + i, load(weight + i) * load(&normalized));
            }
        }
    });
}

// dx = (g - n mean(g n)) / rms with n = x / rms, g = grad * weight; the weight's gradient is summed over pieces of rows
// into `partial` [pieces, width], which must be zero.
template <class T>
void rms_norm_backward(const T* grad, const T* x, const T* weight, const float* inverse_rms, T* grad_x,
                       float* partial, long rows, long width, long piece_rows, int threads) {
    const long pieces = (rows + piece_rows - 1) / piece_rows;
    for_each_task(pieces, threads, [=](long piece) {
        float* grad_weight = partial + piece * width;
        const T* w = weight;  // local copy: otherwise GCC reloads it per element and does not vectorize
        for (long row = piece * piece_rows; row < std::min(rows, (piece + 1) * piece_rows); row++) {
            const T *in = x + row * width, *upstream = grad + row * width;
            T* out = grad_x + row * width;
            const float scale = inverse_rms[row];
            float sum = 0.0f;
            _Pragma("omp simd reduction(+ : sum)") for (long i = 0; i < width; i++) {
                sum += load(upstream + i) * load(w + i) * (load(in + i) * scale);
            }
            const float mean = sum / static_cast<float>(width);
            SIMD for (long i = 0; i < width; i++) {
                const float normalized = load(in + i) * scale, g = load(upstream + i);
                grad_weight[i] += g * normalized;
                store(out + i, (g * load(w + i) - normalized * mean) * scale);
            }
        }
    });
}

// Turns the first `columns` logits of each row into their softmax; the rest is left alone.
template <class T>
void softmax_statistics(T* logits, const std::int64_t* ids, float* largest, float* total, float* target, long rows,
                        long stride, long columns, int threads) {
    for_each_piece(rows, columns, PIECE, threads, [=](long begin, long end) {
        static thread_local Buffer buffer;
        float* exponentials = buffer.floats(columns);
        for (long row = begin; row < end; row++) {
            T* in = logits + row * stride;
            target[row] = ids[row] >= 0 && ids[row] < columns ? load(in + ids[row]) : 0.0f;
            // kept in a float32 buffer: stored in the row, 16 bits would round them twice
            softmax_parts(in, exponentials, columns, 1.0f, largest[row], total[row]);
            const float scale = 1.0f / total[row];
            SIMD for (long i = 0; i < columns; i++) store(in + i, exponentials[i] * scale);
        }
    });
}

// (softmax over the whole vocabulary - one-hot) * grad, from the softmax over this rank's columns; 0 in the columns
// that are padding.
template <class T>
void softmax_gradient(T* softmax, const float* own_logsumexp, const std::int64_t* ids, const float* logsumexp,
                      const float* grad, long rows, long width, long columns, int threads) {
    for_each_piece(rows, width, PIECE, threads, [=](long begin, long end) {
        for (long row = begin; row < end; row++) {
            T* out = softmax + row * width;
            const float scale = std::exp(own_logsumexp[row] - logsumexp[row]) * grad[row];
            const long id = ids[row];
            const float there = id >= 0 && id < columns ? load(out + id) * scale - grad[row] : 0.0f;
            SIMD for (long i = 0; i < columns; i++) store(out + i, load(out + i) * scale);
            if (id >= 0 && id < columns) store(out + id, there);
            for (long i = columns; i < width; i++) store(out + i, 0.0f);
        }
    });
}

// Rotates each pair (x_i, x_{i + half}) of x [batch, heads, positions, 2 half], of any strides but the last, by its
// position's angle; cos and sin are [positions, half], for each sample `table_stride` further.
template <class T>
void rotary(const T* x, const float* cos, const float* sin, T* y, long batch, long heads, long positions, long half,
            const long* strides, long table_stride, float direction, int threads) {
    for_each_piece(batch * heads * positions, 2 * half, PIECE, threads, [=](long begin, long end) {
        for (long row = begin; row < end; row++) {
            const long position = row % positions, head = row / positions % heads, sample = row / positions / heads;
            const T* in = x + sample * strides[0] + head * strides[1] + position * strides[2];
            const float* c = cos + sample * table_stride + position * half;
            const float* s = sin + sample * table_stride + position * half;
            T* out = y + row * 2 * half;
            SIMD for (long i = 0; i < half; i++) {
                const float first = load(in + i), second = load(in + half + i), sine = direction * s[i];
                store(out + i, first * c[i] - second * sine);
                store(out + half + i, second * c[i] + first * sine);
            }
        }
    });
}
