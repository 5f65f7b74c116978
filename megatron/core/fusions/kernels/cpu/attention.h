// Causal attention with grouped heads (arXiv:2307.08691), for one instruction set; included once for each, after its
// products, inside its namespace. Accumulation and the products' operands are float32, except for bfloat16 on AMX:
// there probabilities and the gradients of scores are rounded to bfloat16, as in other fused kernels.
//
// A task works on QUERY_ROWS queries of a head and all keys before them, so that nothing of size S x S is made and the
// softmax needs no second pass. The backward pass recomputes the probabilities from the log-sum-exp.

constexpr long QUERY_ROWS = 96;

// Rows in the products' operand type: used in place, or converted into `space`.
template <class To>
inline Operand<To> as_operand(const To* rows, long stride, long, long, To*) {
    return {rows, stride, 1};
}
template <class To, class From>
inline Operand<To> as_operand(const From* rows, long stride, long count, long width, To* space) {
    for (long row = 0; row < count; row++)
        SIMD for (long i = 0; i < width; i++) store(space + row * width + i, load(rows + row * stride + i));
    return {space, width, 1};
}

// The softmax of scale * scores over the first `valid` of a row, 0 behind them, and their log-sum-exp.
inline void softmax_row(float* scores, long valid, long width, float scale, float& logsumexp) {
    float most, sum;
    softmax_parts(scores, scores, valid, scale, most, sum);
    const float inverse = 1.0f / sum;
    SIMD for (long i = 0; i < valid; i++) scores[i] *= inverse;
    std::fill(scores + valid, scores + width, 0.0f);
    logsumexp = most * scale + std::log(sum);
}

template <class T>
void attention(const T* query, const T* key, const T* value, T* out, float* logsumexp, const AttentionShape& shape,
               int threads) {
    const long width = shape.width, length = shape.length, blocks = (length + QUERY_ROWS - 1) / QUERY_ROWS;
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    for_each_task(shape.batch * shape.heads * blocks, threads, [=](long task) {
        static thread_local Buffer buffer;
        // the longest blocks first, so that no thread begins one when the others are done
        const long block = blocks - 1 - task / (shape.batch * shape.heads);
        const long pair = task % (shape.batch * shape.heads), sample = pair / shape.heads, head = pair % shape.heads;
        const long first = block * QUERY_ROWS, rows = std::min(QUERY_ROWS, length - first), keys = first + rows;
        const long group = head / (shape.heads / shape.groups);
        float* scores = buffer.floats(2 * QUERY_ROWS * (length + width) + 2 * length * width);
        float* context = scores + rows * keys;
        Element<T>* space = reinterpret_cast<Element<T>*>(context + rows * width);
        const auto q =
            as_operand(shape.query.row(query, sample, head, first), shape.query.position, rows, width, space);
        const auto k =
            as_operand(shape.key.row(key, sample, group, 0), shape.key.position, keys, width, space += rows * width);
        const auto v = as_operand(shape.value.row(value, sample, group, 0), shape.value.position, keys, width,
                                  space += keys * width);
        multiply_here(q, k.transposed(), scores, keys, rows, width, keys, 0.0f);
        for (long row = 0; row < rows; row++)
            softmax_row(scores + row * keys, first + row + 1, keys, scale, logsumexp[pair * length + first + row]);
        const auto p = as_operand(scores, keys, rows, keys, space + keys * width);
        multiply_here(p, v, context, width, rows, keys, width, 0.0f);
        for (long row = 0; row < rows; row++) {
            T* to = shape.out.row(out, sample, head, first + row);
            SIMD for (long i = 0; i < width; i++) store(to + i, context[row * width + i]);
        }
    });
}

// Gradients of query, and of key and value separately for each query head: [batch, heads, length, width], the last two
// in float32; they are accumulated into and must be zero on entry.
template <class T>
void attention_backward(const T* grad, const T* query, const T* key, const T* value, const T* out,
                        const float* logsumexp, T* grad_query, float* grad_key, float* grad_value,
                        const AttentionShape& shape, int threads) {
    const long width = shape.width, length = shape.length;
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    for_each_task(shape.batch * shape.heads, threads, [=](long pair) {
        static thread_local Buffer buffer;
        const long sample = pair / shape.heads, head = pair % shape.heads;
        const long group = head / (shape.heads / shape.groups), whole = length * width;
        float* probs = buffer.floats(QUERY_ROWS * (4 * length + 3 * width) + 2 * whole);
        float* grads = probs + QUERY_ROWS * length;  // of probabilities, then of scores
        float* dq = grads + QUERY_ROWS * length;
        Element<T>* space = reinterpret_cast<Element<T>*>(dq + QUERY_ROWS * width);
        const auto k = as_operand(shape.key.row(key, sample, group, 0), shape.key.position, length, width, space);
        const auto v =
            as_operand(shape.value.row(value, sample, group, 0), shape.value.position, length, width, space += whole);
        float *dk = grad_key + pair * whole, *dv = grad_value + pair * whole;
        Element<T> *query_space = space + whole, *grad_space = query_space + QUERY_ROWS * width;
        Element<T> *probs_space = grad_space + QUERY_ROWS * width, *grads_space = probs_space + QUERY_ROWS * length;
        for (long first = 0; first < length; first += QUERY_ROWS) {
            const long rows = std::min(QUERY_ROWS, length - first), keys = first + rows;
            const T* upstream = shape.grad.row(grad, sample, head, first);
            const auto q =
                as_operand(shape.query.row(query, sample, head, first), shape.query.position, rows, width, query_space);
            const auto g = as_operand(upstream, shape.grad.position, rows, width, grad_space);
            multiply_here(q, k.transposed(), probs, keys, rows, width, keys, 0.0f);
            multiply_here(g, v.transposed(), grads, keys, rows, width, keys, 0.0f);
            for (long row = 0; row < rows; row++) {
                const T* o = shape.out.row(out, sample, head, first + row);
                const T* upstream_row = upstream + row * shape.grad.position;
                // sum_k p dp, the row's grad . out
                float inner = 0.0f;
                _Pragma("omp simd reduction(+ : inner)") for (long i = 0; i < width; i++) {
                    inner += load(upstream_row + i) * load(o + i);
                }
                const float normaliser = logsumexp[pair * length + first + row];
                const long valid = first + row + 1;
                float *p = probs + row * keys, *d = grads + row * keys;
                SIMD for (long i = 0; i < valid; i++) {
                    p[i] = exponential(p[i] * scale - normaliser);
                    d[i] = p[i] * (d[i] - inner) * scale;
                }
                std::fill(p + valid, p + keys, 0.0f);
                std::fill(d + valid, d + keys, 0.0f);
            }
            const auto p = as_operand(probs, keys, rows, keys, probs_space);
            const auto ds = as_operand(grads, keys, rows, keys, grads_space);
            multiply_here(p.transposed(), g, dv, width, keys, rows, width, 1.0f);
            multiply_here(ds.transposed(), q, dk, width, keys, rows, width, 1.0f);
            multiply_here(ds, k, dq, width, rows, keys, width, 0.0f);
            for (long row = 0; row < rows; row++) {
                T* to = grad_query + (pair * length + first + row) * width;
                SIMD for (long i = 0; i < width; i++) store(to + i, dq[row * width + i]);
            }
        }
    });
}
