// Products of bfloat16 matrices on a processor with tile registers (Intel AMX: x86's tdpbf16ps), sums in float32.
//
// A tile register holds 16 rows of 64 bytes. C's holds 16 x 16 sums; A's 16 rows of 32 elements of the inner axis; B's
// the same 32 as 16 rows of pairs, one pair for each of 16 columns. As 32-bit elements (one pair each), a
// tile of B is a transposed tile of A. Eight registers make a block of 32 x 32 sums: 4 for them, 2 for A and 2 for B.
// Denormal numbers of A and B count as zero, and denormal sums are flushed to zero when rounded to bfloat16.
//
// A task makes some blocks of C. It packs B, 32 columns at a time, into tiles that lie one after another; A is taken as
// it is where its rows run along the inner axis and whole tiles are there, else its tiles are packed as well.

constexpr long TILE = 16, STEP = 32, BLOCK = 2 * TILE;
constexpr long TILE_ELEMENTS = TILE * STEP, BLOCK_ELEMENTS = BLOCK * BLOCK;
// Tile sizes of a task, tuned so that the parts of A, B and C that are reused fit a second-level cache of 2 MB.
constexpr long TILED_ROWS = 512, TILED_COLUMNS = 512, TILED_INNER = 512;
// Outputs of at least this many bytes in all are written by non-temporal stores, which avoid the read for ownership.
constexpr long STREAMED_BYTES = 1 << 20;

// Configures all registers of this thread as tiles of 16 rows of 64 bytes for its lifetime, and restores the previous
// configuration.
class TileRegisters {
public:
    TileRegisters() {
        alignas(64) std::uint8_t wanted[64] = {1};  // the palette; of each register, its bytes a row and its rows
        for (int i = 0; i < 8; i++) {
            wanted[16 + 2 * i] = 64;
            wanted[48 + i] = 16;
        }
        _tile_storeconfig(before_);
        configure(wanted);
    }
    ~TileRegisters() { configure(before_); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;

private:
    alignas(64) std::uint8_t before_[64];

    static void configure(const std::uint8_t* bytes) {
        // GCC's intrinsics say that 8 bytes are read and written; all must be in memory by now
        asm volatile("" : : "r"(bytes) : "memory");
        _tile_loadconfig(bytes);
    }
};

// 16 lines of 32 elements of the inner axis, lines of A or of B transposed, as a tile of A, or of B with PAIRS.
template <bool PAIRS>
inline void pack_tile(const Operand<BFloat16>& from, BFloat16* packed) {
    Vector rows[TILE];
    if (from.column_stride == 1) {
        for (long i = 0; i < TILE; i++) rows[i] = (Vector)_mm512_loadu_si512(from.data + i * from.row_stride);
        if (PAIRS) transpose(rows);
    } else {
        for (long i = 0; i < TILE; i++) {
            const BFloat16 *even = from.data + 2 * i * from.column_stride, *odd = even + from.column_stride;
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
            rows[i] = (Vector)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
        if (!PAIRS) transpose(rows);
    }
    for (long i = 0; i < TILE; i++) *(Vector*)(packed + i * STEP) = rows[i];
}

// The same of fewer lines or elements, with zeros beyond them.
template <bool PAIRS>
inline void pack_edge(const Operand<BFloat16>& from, long lines, long inner, BFloat16* packed) {
    alignas(64) BFloat16 whole[TILE_ELEMENTS] = {};
    if (from.column_stride == 1) {
        const auto mask = static_cast<__mmask32>((1ULL << inner) - 1);
        for (long i = 0; i < lines; i++)
            _mm512_store_si512(whole + i * STEP, _mm512_maskz_loadu_epi16(mask, from.from(i, 0).data));
        pack_tile<PAIRS>({whole, STEP, 1}, packed);
    } else {
        const auto mask = static_cast<__mmask16>((1U << lines) - 1);
        for (long k = 0; k < inner; k++)
            _mm256_store_si256((__m256i*)(whole + k * TILE), _mm256_maskz_loadu_epi16(mask, from.from(0, k).data));
        pack_tile<PAIRS>({whole, 1, TILE}, packed);
    }
}

// Some lines (at most 32) as pairs of tiles, one step of the inner axis after another.
template <bool PAIRS>
__attribute__((noinline)) void pack_block(const Operand<BFloat16>& from, long lines, long inner, BFloat16* packed) {
    for (long k = 0; k < inner; k += STEP) {
        const long here = std::min(STEP, inner - k);
        for (long line = 0; line < BLOCK; line += TILE, packed += TILE_ELEMENTS) {
            if (here == STEP && line + TILE <= lines)
                pack_tile<PAIRS>(from.from(line, k), packed);
            else
                pack_edge<PAIRS>(from.from(line, k), std::clamp(lines - line, 0L, TILE), here, packed);
        }
    }
}

// The cache lines of B that are packed next, fetched while tiles are multiplied so that nobody waits for memory.
class Ahead {
public:
    Ahead() = default;
    Ahead(const Operand<BFloat16>& next, long lines, long inner) {
        const bool along = next.column_stride == 1;
        const long rows = along ? lines : inner;
        data_ = reinterpret_cast<const char*>(next.data);
        row_bytes_ = (along ? next.row_stride : next.column_stride) * static_cast<long>(sizeof(BFloat16));
        of_row_ = ((along ? inner : lines) * static_cast<long>(sizeof(BFloat16)) + 63) / 64;
        lines_ = rows * of_row_;
    }
    // Prefetches enough lines per call to cover all of them in `times` calls.
    void spread_over(long times) { count_ = (lines_ + times - 1) / std::max(1L, times); }
    void fetch() {
        for (const long end = std::min(lines_, line_ + count_); line_ < end; line_++)
            _mm_prefetch(data_ + line_ / of_row_ * row_bytes_ + line_ % of_row_ * 64, _MM_HINT_T0);
    }

private:
    const char* data_ = nullptr;
    long row_bytes_ = 0, of_row_ = 1, line_ = 0, lines_ = 0, count_ = 0;
};

// 32 rows of A as tiles: where the upper and the lower tile of the first step lie, bytes between the rows of a tile,
// elements between a step and the next.
struct TileRows {
    const BFloat16 *upper, *lower;
    long row_bytes, step;
};

// sums = A B, or sums += A B with `add`, for a block; B's tiles are packed.
__attribute__((noinline)) void multiply_tiles(const TileRows& a, const BFloat16* b, long steps, bool add, float* sums,
                                              Ahead& ahead) {
    constexpr long ROW = BLOCK * sizeof(float);
    asm volatile("" : : : "memory");  // GCC's intrinsics do not say that they read what a tile is loaded from
    if (add) {
        _tile_loadd(0, sums, ROW);
        _tile_loadd(1, sums + TILE, ROW);
        _tile_loadd(2, sums + TILE * BLOCK, ROW);
        _tile_loadd(3, sums + TILE * BLOCK + TILE, ROW);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long step = 0; step < steps; step++, b += 2 * TILE_ELEMENTS) {
        _tile_loadd(4, a.upper + step * a.step, a.row_bytes);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + TILE_ELEMENTS, 64);
        ahead.fetch();
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a.lower + step * a.step, a.row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, ROW);
    _tile_stored(1, sums + TILE, ROW);
    _tile_stored(2, sums + TILE * BLOCK, ROW);
    _tile_stored(3, sums + TILE * BLOCK + TILE, ROW);
}

// c = beta c + 16 sums, or what the mask leaves of them.
inline void write_sums(float* c, __m512 sums, __mmask16 mask, float beta) {
    if (beta != 0.0f) sums = _mm512_fmadd_ps(_mm512_set1_ps(beta), _mm512_maskz_loadu_ps(mask, c), sums);
    _mm512_mask_storeu_ps(c, mask, sums);
}

inline void write_sums(BFloat16* c, __m512 sums, __mmask16 mask, float beta) {
    if (beta != 0.0f) {
        const __m512i before = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, c)), 16);
        sums = _mm512_fmadd_ps(_mm512_set1_ps(beta), _mm512_castsi512_ps(before), sums);
    }
    _mm256_mask_storeu_epi16(c, mask, (__m256i)_mm512_cvtneps_pbh(sums));
}

// 32 of them past the caches; c is aligned to 64 bytes.
inline void stream_sums(float* c, __m512 first, __m512 second) {
    _mm512_stream_ps(c, first);
    _mm512_stream_ps(c + TILE, second);
}

inline void stream_sums(BFloat16* c, __m512 first, __m512 second) {
    _mm512_stream_si512((__m512i*)c, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// Some rows and columns of C = beta * C + A B.
template <class Out>
class TiledTask {
public:
    TiledTask(const Product<BFloat16, Out>& product, long row, long rows, long column, long columns, bool stream)
        : p_(product), row_(row), rows_(rows), column_(column), columns_(columns), stream_(stream && p_.beta == 0.0f),
          row_blocks_((rows + BLOCK - 1) / BLOCK), column_blocks_((columns + BLOCK - 1) / BLOCK),
          parts_(std::max(1L, (p_.inner + TILED_INNER - 1) / TILED_INNER)) {}

    void run() const {
        static thread_local Buffer buffer;
        const long steps = (std::min(p_.inner, TILED_INNER) + STEP - 1) / STEP, panel = 2 * steps * TILE_ELEMENTS;
        // with one part of the inner axis, sums are written as soon as they are made
        const long kept = (parts_ > 1 ? row_blocks_ * column_blocks_ : 1) * BLOCK_ELEMENTS;
        float* sums = buffer.floats(kept + (row_blocks_ + 1) * panel / 2);
        BFloat16* packed_b = reinterpret_cast<BFloat16*>(sums + kept);
        for (long part = 0; part < parts_; part++) make_part(part, sums, packed_b, packed_b + panel);
        _mm_sfence();  // what was streamed is there before the task counts as done
    }

private:
    const Product<BFloat16, Out>& p_;
    const long row_, rows_, column_, columns_;
    const bool stream_;
    const long row_blocks_, column_blocks_, parts_;

    long height(long block) const { return std::min(BLOCK, rows_ - block * BLOCK); }
    long width(long block) const { return std::min(BLOCK, columns_ - block * BLOCK); }

    // What one part of the inner axis adds to all blocks.
    void make_part(long part, float* sums, BFloat16* packed_b, BFloat16* packed_a) const {
        const long k = part * TILED_INNER, inner = std::min(TILED_INNER, p_.inner - k);
        const long steps = (inner + STEP - 1) / STEP;
        const Operand<BFloat16> a = p_.a.from(row_, k), b = p_.b.from(k, column_).transposed();
        std::vector<TileRows> tiles;
        for (long block = 0; block < row_blocks_; block++) {
            const Operand<BFloat16> from = a.from(block * BLOCK, 0);
            if (from.column_stride == 1 && inner % STEP == 0 && height(block) == BLOCK) {
                const long row_bytes = from.row_stride * static_cast<long>(sizeof(BFloat16));
                tiles.push_back({from.data, from.from(TILE, 0).data, row_bytes, STEP});
            } else {
                BFloat16* packed = packed_a + block * 2 * steps * TILE_ELEMENTS;
                pack_block<false>(from, height(block), inner, packed);
                tiles.push_back({packed, packed + TILE_ELEMENTS, 64, 2 * TILE_ELEMENTS});
            }
        }
        for (long column = 0; column < column_blocks_; column++) {
            pack_block<true>(b.from(column * BLOCK, 0), width(column), inner, packed_b);
            Ahead ahead;
            if (column + 1 < column_blocks_) ahead = Ahead(b.from((column + 1) * BLOCK, 0), width(column + 1), inner);
            ahead.spread_over(row_blocks_ * steps);
            for (long block = 0; block < row_blocks_; block++) {
                float* here = sums + (parts_ > 1 ? block * column_blocks_ + column : 0) * BLOCK_ELEMENTS;
                if (part == parts_ - 1 && !stream_) prefetch_output(block, column);
                multiply_tiles(tiles[block], packed_b, steps, part > 0, here, ahead);
                if (part == parts_ - 1) write(block, column, here);
            }
        }
    }

    Out* block_of_c(long block, long column) const {
        return p_.c + (row_ + block * BLOCK) * p_.c_stride + column_ + column * BLOCK;
    }

    // Fetches the first cache line of each row of a block, which is far away and is written when its sums are made.
    void prefetch_output(long block, long column) const {
        const Out* c = block_of_c(block, column);
        for (long m = 0; m < height(block); m++) __builtin_prefetch(c + m * p_.c_stride, 1);
    }

    void write(long block, long column, const float* sums) const {
        Out* c = block_of_c(block, column);
        const long rows = height(block), columns = width(column);
        const auto first_mask = static_cast<__mmask16>((1U << std::min(columns, TILE)) - 1);
        const auto second_mask = static_cast<__mmask16>((1U << std::max(columns - TILE, 0L)) - 1);
        const std::size_t place = reinterpret_cast<std::uintptr_t>(c) | p_.c_stride * sizeof(Out);
        const bool stream = stream_ && columns == BLOCK && place % 64 == 0;
        for (long m = 0; m < rows; m++, c += p_.c_stride, sums += BLOCK) {
            const __m512 first = _mm512_load_ps(sums), second = _mm512_load_ps(sums + TILE);
            if (stream) {
                stream_sums(c, first, second);
            } else {
                write_sums(c, first, first_mask, p_.beta);
                write_sums(c + TILE, second, second_mask, p_.beta);
            }
        }
    }
};

template <class Out>
inline void multiply_tiled(const std::vector<Product<BFloat16, Out>>& products, int threads) {
    long bytes = 0;
    for (const auto& p : products) bytes += p.rows * p.columns * static_cast<long>(sizeof(Out));
    const auto count = [&](long widest) {
        long tasks = 0;
        for (const auto& p : products)
            tasks += (p.rows + TILED_ROWS - 1) / TILED_ROWS * ((p.columns + widest - 1) / widest);
        return tasks;
    };
    long widest = TILED_COLUMNS;  // narrower where some threads would have nothing to do
    while (threads > 1 && widest > BLOCK && count(widest) < 2 * threads) widest /= 2;
    std::vector<TiledTask<Out>> tasks;
    for (const auto& p : products)
        for (long row = 0; row < p.rows; row += TILED_ROWS)
            for (long column = 0; column < p.columns; column += widest)
                tasks.emplace_back(p, row, std::min(TILED_ROWS, p.rows - row), column,
                                   std::min(widest, p.columns - column), bytes >= STREAMED_BYTES);
    for_each_task(static_cast<long>(tasks.size()), threads, [&](long task) {
        const TileRegisters registers;
        tasks[task].run();
    });
}

// C = beta * C + A B on this thread.
inline void multiply_here(const Operand<BFloat16>& a, const Operand<BFloat16>& b, float* c, long c_stride, long rows,
                          long inner, long columns, float beta) {
    const TileRegisters registers;
    const Product<BFloat16, float> product{a, b, c, c_stride, rows, inner, columns, beta};
    TiledTask<float>(product, 0, rows, 0, columns, false).run();
}
