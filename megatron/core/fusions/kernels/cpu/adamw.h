// AdamW for one instruction set, included once for each inside its namespace: every number is read and written once,
// in the type that it is kept in, and computed with in float32. The formulas are in megatron/core/fusions/stored.py.

constexpr long SCALED = 64;  // numbers with one scale
constexpr long SPAN = 1024;  // numbers that are float32 at a time, in a core's first-level cache; whole blocks

// A floating type of `MANTISSA` bits behind the point and a bias of its exponents, in the low bits of T.
template <class T, int MANTISSA, int BIAS, int MOST>
struct Narrow {
    static constexpr int SIGN = 8 * sizeof(T) - 1;
    static constexpr std::uint32_t REBIAS = static_cast<std::uint32_t>(127 - BIAS);
    static constexpr int SHIFT = 23 - MANTISSA;

    // Of a number from 0 to MOST, to nearest, ties to even.
    static std::uint32_t from(float y) {
        const float smallest_normal = bits_to_float((REBIAS + 1) << 23);
        const float to_subnormal = bits_to_float((REBIAS + 1 + SHIFT) << 23);  // what is added to it is rounded
        const std::uint32_t bits = float_to_bits(y);
        const std::uint32_t rounded = (bits + (1u << (SHIFT - 1)) - 1 + ((bits >> SHIFT) & 1)) >> SHIFT;
        const std::uint32_t subnormal = float_to_bits(y + to_subnormal) - float_to_bits(to_subnormal);
        return y < smallest_normal ? subnormal : rounded - (REBIAS << MANTISSA);
    }

    static float to_float(std::uint32_t magnitude) {
        const float subnormal =
            static_cast<float>(static_cast<std::int32_t>(magnitude)) * bits_to_float((REBIAS + 1 - MANTISSA) << 23);
        const float normal = bits_to_float((magnitude << SHIFT) + (REBIAS << 23));
        return magnitude >> MANTISSA ? normal : subnormal;
    }

    static void read(const Stored& from, long begin, long count, float* to) {
        const T* data = static_cast<const T*>(from.data) + begin;
        for (long start = 0; start < count; start += SCALED) {
            const std::uint32_t exponent = from.exponents[(begin + start) / SCALED];
            const float scale = bits_to_float(exponent << 23);
            const long end = std::min(count, start + SCALED);
            SIMD for (long i = start; i < end; i++) {
                const std::uint32_t bits = data[i], sign = bits >> SIGN << 31;
                const float size = to_float(bits & ((1u << SIGN) - 1)) * scale;
                to[i] = bits_to_float(float_to_bits(size) | sign);
            }
        }
    }

    static void write(const float* from, const Stored& to, long begin, long count) {
        T* data = static_cast<T*>(to.data) + begin;
        const std::uint32_t lift = to.positive ? 1 : 0;
        for (long start = 0; start < count; start += SCALED) {
            const long end = std::min(count, start + SCALED);
            std::int32_t largest = 0;
            _Pragma("omp simd reduction(max : largest)") for (long i = start; i < end; i++) {
                const std::int32_t size = static_cast<std::int32_t>(float_to_bits(from[i]) & 0x7fffffff);
                largest = size > largest ? size : largest;
            }
            const int exponent = std::max(((largest + (1 << (SHIFT - 1))) >> 23) - BIAS, BIAS + MANTISSA);
            to.exponents[(begin + start) / SCALED] = static_cast<std::uint8_t>(exponent);
            const float inverse = bits_to_float(static_cast<std::uint32_t>(254 - exponent) << 23);
            SIMD for (long i = start; i < end; i++) {
                const std::uint32_t bits = float_to_bits(from[i]), sign = bits >> 31 << SIGN;
                const float size = bits_to_float(bits & 0x7fffffff) * inverse;
                const std::uint32_t narrow = Narrow::from(size < MOST ? size : static_cast<float>(MOST));
                // without branches, which would keep the loop from being vectorized
                const std::uint32_t lost = static_cast<std::uint32_t>(from[i] > 0.0f) & (narrow == 0 ? lift : 0);
                data[i] = static_cast<T>(narrow | lost | sign);
            }
        }
    }
};

using Float16 = Narrow<std::uint16_t, 10, 15, 65504>;
using Float8 = Narrow<std::uint8_t, 3, 7, 448>;

// The upper half of a master, rounded to nearest, halves away from zero.
inline std::uint32_t upper_half(float x) {
    const std::uint32_t bits = float_to_bits(x);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x8000) >> 16;
}

// Numbers begin ... begin + count in float32: where they lie, or made in `room`.
inline float* read(const Stored& stored, long begin, long count, float* room) {
    switch (stored.storage) {
        case Storage::FLOAT32: return static_cast<float*>(stored.data) + begin;
        case Storage::FLOAT16: Float16::read(stored, begin, count, room); break;
        case Storage::FLOAT8: Float8::read(stored, begin, count, room); break;
        case Storage::BFLOAT16: {
            const BFloat16* data = static_cast<const BFloat16*>(stored.data) + begin;
            SIMD for (long i = 0; i < count; i++) room[i] = load(data + i);
            break;
        }
        case Storage::REMAINDER: {
            const std::int16_t* data = static_cast<const std::int16_t*>(stored.data) + begin;
            const BFloat16* weights = stored.weights + begin;
            SIMD for (long i = 0; i < count; i++) {
                const std::uint32_t upper = static_cast<std::uint32_t>(weights[i].bits) << 16;
                room[i] = bits_to_float(upper + static_cast<std::uint32_t>(static_cast<std::int32_t>(data[i])));
            }
        }
    }
    return room;
}

// The other way; `values` is what `read` returned.
inline void write(const float* values, const Stored& stored, long begin, long count) {
    switch (stored.storage) {
        case Storage::FLOAT32: break;
        case Storage::FLOAT16: Float16::write(values, stored, begin, count); break;
        case Storage::FLOAT8: Float8::write(values, stored, begin, count); break;
        case Storage::BFLOAT16: {
            BFloat16* data = static_cast<BFloat16*>(stored.data) + begin;
            SIMD for (long i = 0; i < count; i++) store(data + i, values[i]);
            break;
        }
        case Storage::REMAINDER: {
            std::uint16_t* data = static_cast<std::uint16_t*>(stored.data) + begin;
            BFloat16* weights = stored.weights + begin;
            SIMD for (long i = 0; i < count; i++) {
                const std::uint32_t bits = float_to_bits(values[i]);
                weights[i].bits = static_cast<std::uint16_t>(upper_half(values[i]));
                data[i] = static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0 : bits);
            }
        }
    }
}

// Numbers of a step in float32.
struct AdamWRates {
    float beta1, beta2, other1, other2, factor, rate, root, kept, epsilon;
};

// Not inlined, so that all ways of keeping numbers get the same bits.
[[gnu::noinline]] inline void update(float* master, float* exp_avg, float* exp_avg_sq, const float* grad, long count,
                                     const AdamWRates& step) {
    const auto [beta1, beta2, other1, other2, factor, rate, root, kept, epsilon] = step;
    SIMD for (long i = 0; i < count; i++) {
        const float g = grad[i] * factor;
        const float m = beta1 * exp_avg[i] + other1 * g, v = beta2 * exp_avg_sq[i] + other2 * g * g;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        master[i] = kept * master[i] - rate * m / (std::sqrt(v) * root + epsilon);
    }
}

// One update of `count` masters; `weights`, if there are any, get them rounded.
inline void adamw(const Stored& master, const Stored& exp_avg, const Stored& exp_avg_sq, const Stored& grad,
                  BFloat16* weights, long count, const AdamW& step, int threads) {
    const AdamWRates rates{
        static_cast<float>(step.beta1),
        static_cast<float>(step.beta2),
        static_cast<float>(1.0 - step.beta1),
        static_cast<float>(1.0 - step.beta2),
        static_cast<float>(step.factor),
        static_cast<float>(step.learning_rate / (1.0 - std::pow(step.beta1, step.number))),
        static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(step.beta2, step.number))),
        static_cast<float>(1.0 - step.learning_rate * step.weight_decay),
        static_cast<float>(step.epsilon),
    };
    for_each_piece(count, 1, PIECE, threads, [&](long begin, long end) {
        float room[4][SPAN];
        for (; begin < end; begin += SPAN) {
            const long size = std::min(SPAN, end - begin);
            float* w = read(master, begin, size, room[0]);
            float* m = read(exp_avg, begin, size, room[1]);
            float* v = read(exp_avg_sq, begin, size, room[2]);
            update(w, m, v, read(grad, begin, size, room[3]), size, rates);
            write(w, master, begin, size);
            write(m, exp_avg, begin, size);
            write(v, exp_avg_sq, begin, size);
            if (weights) {
                SIMD for (long i = 0; i < size; i++) {
                    weights[begin + i].bits = static_cast<std::uint16_t>(upper_half(w[i]));
                }
            }
        }
    });
}
