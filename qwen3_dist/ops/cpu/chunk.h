// A chunk of keys or values, laid out as the weights of a product.
#pragma once

#include "linear.h"

constexpr long CHUNK = BLOCK_COLS;  // tokens

// Rows of a chunk as products take inputs, each `width` long and followed by zeros; rows beyond the last are zeros.
template <class T, class P>
struct Chunk {
    const P* rows[CHUNK];
    P* copies;

    Chunk(P* copies, long width) : copies(copies) {
        std::fill(copies, copies + width, P{});
        std::fill(rows, rows + CHUNK, copies);
    }

    // A row that is used where it lies if it can be; else its copy is.
    void take(long j, const T* row, long dim, long width) {
        if constexpr (std::is_same_v<T, P>)
            if (dim == width) {
                rows[j] = row;
                return;
            }
        P* copy = copies + (j + 1) * width;
        put_row(row, copy, dim, width);
        rows[j] = copy;
    }
};

template <int S = LANES / 2>
inline void transpose(Words (&rows)[LANES]) {
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) swap_lanes<S>(rows[i], rows[i + S], std::make_integer_sequence<int, LANES>());
    if constexpr (S > 1) transpose<S / 2>(rows);
}

// The weights of products with keys: panels of the first n rows, whose width is whole vectors of words.
template <class T, class P>
inline void lay_keys(const Chunk<T, P>& chunk, long n, long width, P* laid) {
    constexpr long STEP = LANES * PAIR<P>;
    for (long j = 0; j < panels(n) * PANEL; j += LANES)
        for (long i = 0; i < width; i += STEP) {
            Words words[LANES];
            for (int r = 0; r < LANES; r++) words[r] = *(const Words*)(chunk.rows[j + r] + i);
            transpose(words);
            P* to = laid + j / PANEL * PANEL * width + i * PANEL + j % PANEL * PAIR<P>;
            for (int r = 0; r < LANES; r++) *(Words*)(to + r * PANEL * PAIR<P>) = words[r];
        }
}

// The weights of products that add up values: their columns in panels, the first `depth` rows as inputs.
inline void lay_values(const Chunk<bf16, bf16>& chunk, long depth, long width, bf16* laid) {
    for (long j = 0; j < depth; j += 2)
        for (long i = 0; i < width; i += LANES) {
            Words even = widened(*(const Halves*)(chunk.rows[j] + i));
            Words odd = widened(*(const Halves*)(chunk.rows[j + 1] + i));
            *(Words*)(laid + i / PANEL * PANEL * depth + j * PANEL + i % PANEL * 2) = even | (odd << 16);
        }
}

template <class T>
inline void lay_values(const Chunk<T, float>& chunk, long depth, long width, float* laid) {
    for (long j = 0; j < depth; j++)
        for (long i = 0; i < width; i += LANES)
            store(laid + i / PANEL * PANEL * depth + j * PANEL + i % PANEL, load(chunk.rows[j] + i));
}
