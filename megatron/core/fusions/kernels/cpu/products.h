// Products of float32 matrices for one instruction set; included once for each, inside its namespace.
//
// A task computes a tile of C. It packs B into panels of VECTORS vectors per step of the inner axis, and reads A in
// place if its rows are contiguous along the inner axis (otherwise A is packed as well); the micro-kernel then keeps
// ROWS x VECTORS vectors of C in registers while it goes along the inner axis (Goto and van de Geijn,
// doi:10.1145/1356052.1356053).

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

constexpr long PANEL = WIDTH * VECTORS;
// Inner steps between two visits of a tile of C. With the values below, what a task reads again and again fits a
// second-level cache of 1 MB; all were chosen by measuring.
constexpr long MAX_INNER = 512;
// The largest tile if A is read in place, and if it is packed (wider, to amortize the packing).
constexpr long DIRECT_ROWS = 384, DIRECT_COLUMNS = 2 * PANEL;
constexpr long PACKED_ROWS = 256, PACKED_COLUMNS = 512 / PANEL * PANEL;

// Turns WIDTH rows into columns: log2(WIDTH) times, row i is interleaved with row i + WIDTH / 2.
inline __attribute__((always_inline)) void transpose(Vector (&rows)[WIDTH]) {
#ifdef __clang__  // has no shuffle whose order is a variable
    Vector columns[WIDTH];
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < WIDTH; j++) columns[i][j] = rows[j][i];
    for (int i = 0; i < WIDTH; i++) rows[i] = columns[i];
#else
    typedef int Lanes __attribute__((vector_size(4 * WIDTH)));
    Lanes low, high;
    for (int i = 0; i < WIDTH; i++) {
        low[i] = i / 2 + i % 2 * WIDTH;
        high[i] = low[i] + WIDTH / 2;
    }
    for (int stage = 1; stage < WIDTH; stage *= 2) {
        Vector next[WIDTH];
        for (int i = 0; i < WIDTH / 2; i++) {
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + WIDTH / 2], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + WIDTH / 2], high);
        }
        for (int i = 0; i < WIDTH; i++) rows[i] = next[i];
    }
#endif
}

// A part of B, `inner` x `columns` (at most PANEL), as rows of `width` elements; what is beyond `columns` is zero.
inline void pack_panel(const Operand<float>& b, long inner, long columns, long width, float* packed) {
    if (b.column_stride == 1) {
        for (long k = 0; k < inner; k++, packed += width) {
            const float* row = b.data + k * b.row_stride;
            if (columns == PANEL) {
                for (int v = 0; v < VECTORS; v++)
                    *(Vector*)(packed + v * WIDTH) = *(const Vector*)(row + v * WIDTH);
            } else {
                for (long n = 0; n < width; n++) packed[n] = n < columns ? row[n] : 0.0f;
            }
        }
        return;
    }
    for (long n = 0; n < width; n += WIDTH) {
        const float* rows = b.data + n * b.column_stride;
        long k = 0;
        if (n + WIDTH <= columns && b.row_stride == 1) {
            for (; k + WIDTH <= inner; k += WIDTH) {
                Vector square[WIDTH];
                for (int i = 0; i < WIDTH; i++) square[i] = *(const Vector*)(rows + i * b.column_stride + k);
                transpose(square);
                for (int i = 0; i < WIDTH; i++) *(Vector*)(packed + (k + i) * width + n) = square[i];
            }
        }
        for (; k < inner; k++)
            for (long i = 0; i < WIDTH; i++)
                packed[k * width + n + i] =
                    n + i < columns ? rows[i * b.column_stride + k * b.row_stride] : 0.0f;
    }
}

// A part of A, `rows` x `inner`, in blocks of ROWS rows with their elements of one inner step side by side.
inline void pack_rows(const Operand<float>& a, long rows, long inner, float* packed) {
    for (long k = 0; k < inner; k++) {
        const float* from = a.data + k * a.column_stride;
        float* to = packed + k * ROWS;
        long m = 0;
        if (a.row_stride == 1)
            for (; m + ROWS <= rows; m += ROWS, to += inner * ROWS) std::memcpy(to, from + m, ROWS * sizeof(float));
        for (; m < rows; m += ROWS, to += inner * ROWS)
            for (long i = 0; i < std::min<long>(ROWS, rows - m); i++) to[i] = from[(m + i) * a.row_stride];
    }
}

// What a micro-kernel works on: some rows of A, a panel of B, a tile of C.
struct Work {
    const float* a;
    long a_stride;  // of rows that are not packed
    const float* panel;
    long inner;
    float* c;
    long c_stride, columns;
    float beta;
};

// M rows of C, N vectors wide. Not inlined: as a part of another function it does not get all registers.
template <int M, int N, bool PACKED>
__attribute__((noinline)) void micro_kernel(const Work& work) {
    const float *a = work.a, *panel = work.panel;
    const long inner = work.inner, columns = work.columns, c_stride = work.c_stride;
    float* c = work.c;
    const float beta = work.beta;
    const long step_m = PACKED ? 1 : work.a_stride, step_k = PACKED ? ROWS : 1;
    Vector sums[M][N] = {};
    for (long k = 0; k < inner; k++, panel += N * WIDTH) {
        Vector b[N];
        for (int n = 0; n < N; n++) b[n] = *(const Vector*)(panel + n * WIDTH);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            const float x = a[m * step_m + k * step_k];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sums[m][n] += x * b[n];
        }
    }
    if (columns == N * WIDTH) {
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) {
                Vector* place = (Vector*)(c + m * c_stride + n * WIDTH);
                *place = beta == 0.0f ? sums[m][n] : beta * *place + sums[m][n];
            }
        return;
    }
    for (int m = 0; m < M; m++)
        for (long n = 0; n < columns; n++) {
            const float sum = sums[m][n / WIDTH][n % WIDTH];
            float* place = c + m * c_stride + n;
            *place = beta == 0.0f ? sum : beta * *place + sum;
        }
}

template <int N, bool PACKED>
inline void some_rows(long rows, const Work& work) {
    switch (rows) {
#define CASE(M) \
    case M: return micro_kernel<(M <= ROWS ? M : ROWS), N, PACKED>(work);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

template <bool PACKED>
inline void all_rows(long rows, Work work) {
    static_assert(ROWS <= 6 && VECTORS <= 4, "the cases here");
    const long vectors = (work.columns + WIDTH - 1) / WIDTH;
    for (long m = 0; m < rows; m += ROWS) {
        const long count = std::min<long>(ROWS, rows - m);
        for (int i = 0; i < count; i++)  // C is far away, and is needed when the kernel ends
            for (long n = 0; n < work.columns; n += 16) __builtin_prefetch(work.c + i * work.c_stride + n, 1);
        switch (vectors) {
            case 1: some_rows<1, PACKED>(count, work); break;
            case 2: some_rows<2, PACKED>(count, work); break;
            case 3: some_rows<3, PACKED>(count, work); break;
            default: some_rows<4, PACKED>(count, work);
        }
        work.a += ROWS * (PACKED ? work.inner : work.a_stride);
        work.c += ROWS * work.c_stride;
    }
}

// One tile of C = beta * C + A B.
inline void make_tile(const Product<float, float>& p, long row, long rows, long column, long columns) {
    static thread_local Buffer buffer;
    const bool direct = p.a.column_stride == 1;
    const long longest = std::min(p.inner, MAX_INNER);
    const long row_blocks = (rows + ROWS - 1) / ROWS * ROWS;
    float* panel = buffer.floats(longest * PANEL + (direct ? 0 : longest * row_blocks));
    float* packed_rows = panel + longest * PANEL;
    // at least one, so that inner == 0 gives beta * C
    const long blocks = std::max(1L, (p.inner + MAX_INNER - 1) / MAX_INNER);
    for (long block = 0; block < blocks; block++) {
        const long k = p.inner * block / blocks, inner = p.inner * (block + 1) / blocks - k;
        const float beta = block ? 1.0f : p.beta;
        const Operand<float> a = p.a.from(row, k);
        if (!direct) pack_rows(a, rows, inner, packed_rows);
        for (long n = column; n < column + columns; n += PANEL) {
            const long here = std::min(PANEL, column + columns - n);
            const long width = (here + WIDTH - 1) / WIDTH * WIDTH;
            pack_panel(p.b.from(k, n), inner, here, width, panel);
            const Work work{direct ? a.data : packed_rows, a.row_stride, panel, inner,
                            p.c + row * p.c_stride + n, p.c_stride, here, beta};
            if (direct)
                all_rows<false>(rows, work);
            else
                all_rows<true>(rows, work);
        }
    }
}

inline void multiply(const std::vector<Product<float, float>>& products, int threads) {
    struct Tile {
        const Product<float, float>* product;
        long row, rows, column, columns;
    };
    std::vector<Tile> tiles;
    for (const Product<float, float>& p : products) {
        const bool direct = p.a.column_stride == 1;
        const long widest = direct ? DIRECT_COLUMNS : PACKED_COLUMNS, most = direct ? DIRECT_ROWS : PACKED_ROWS;
        const long parts = (p.rows + most - 1) / most, blocks = (p.rows + ROWS - 1) / ROWS;
        for (long part = 0; part < parts; part++) {
            const long row = blocks * part / parts * ROWS;
            const long rows = std::min(p.rows, blocks * (part + 1) / parts * ROWS) - row;
            for (long column = 0; column < p.columns; column += widest)
                tiles.push_back({&p, row, rows, column, std::min(widest, p.columns - column)});
        }
    }
    for_each_task(static_cast<long>(tiles.size()), threads, [&](long task) {
        const Tile& tile = tiles[task];
        make_tile(*tile.product, tile.row, tile.rows, tile.column, tile.columns);
    });
}

// C = beta * C + A B on this thread.
inline void multiply_here(const Operand<float>& a, const Operand<float>& b, float* c, long c_stride, long rows,
                          long inner, long columns, float beta) {
    for (long row = 0; row < rows; row += PACKED_ROWS)
        make_tile({a, b, c, c_stride, rows, inner, columns, beta}, row, std::min(PACKED_ROWS, rows - row), 0, columns);
}
