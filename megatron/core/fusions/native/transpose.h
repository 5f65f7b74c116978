// Vectors of WIDTH floats, and WIDTH of them turned; included once for each instruction set, inside its namespace.

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

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
