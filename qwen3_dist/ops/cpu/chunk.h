// A chunk of keys or values, packed as the weights of a product.
#pragma once

#include "linear.h"

constexpr long CHUNK = BLOCK_COLS;  // tokens

// The rows of a chunk in the input type of products, each padded with zeros to `width`. Missing rows are zeros.
template <class T, class P>
struct Chunk {
    const P* rows[CHUNK];
    P* copies;

    Chunk(P* copies, long width) : copies(copies) {
        std::fill(copies, copies + width, P{});
        std::fill(rows, rows + CHUNK, copies);
    }

    // Sets row j: in place if type and width allow it, else a copy.
    void set(long j, const T* row, long dim, long width) {
        if constexpr (std::is_same_v<T, P>)
            if (dim == width) {
                rows[j] = row;
                return;
            }
        P* copy = copies + (j + 1) * width;
        convert_input(row, copy, dim, width);
        rows[j] = copy;
    }
};

template <int S = LANES / 2>
inline void transpose(Words (&rows)[LANES]) {
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) swap_lanes<S>(rows[i], rows[i + S], std::make_integer_sequence<int, LANES>());
    if constexpr (S > 1) transpose<S / 2>(rows);
}

// Packs keys as weights: panels of the first n rows. `width` is a multiple of a vector of words.
template <class T, class P>
inline void pack_keys(const Chunk<T, P>& chunk, long n, long width, P* packed) {
    constexpr long STEP = LANES * PAIR<P>;
    for (long j = 0; j < panels(n) * PANEL; j += LANES)
        for (long i = 0; i < width; i += STEP) {
            Words words[LANES];
            for (int r = 0; r < LANES; r++) words[r] = *(const Words*)(chunk.rows[j + r] + i);
            transpose(words);
            P* to = packed + j / PANEL * PANEL * width + i * PANEL + j % PANEL * PAIR<P>;
            for (int r = 0; r < LANES; r++) *(Words*)(to + r * PANEL * PAIR<P>) = words[r];
        }
}

// Packs values as weights: panels of their columns, with the first `depth` rows as inputs.
template <class T>
inline void pack_values(const Chunk<T, bf16>& chunk, long depth, long width, bf16* packed) {
    for (long j = 0; j < depth; j += 2)
        for (long i = 0; i < width; i += LANES) {
            Words even = widened(*(const Halves*)(chunk.rows[j] + i));
            Words odd = widened(*(const Halves*)(chunk.rows[j + 1] + i));
            *(Words*)(packed + i / PANEL * PANEL * depth + j * PANEL + i % PANEL * 2) = even | (odd << 16);
        }
}

template <class T>
inline void pack_values(const Chunk<T, float>& chunk, long depth, long width, float* packed) {
    for (long j = 0; j < depth; j++)
        for (long i = 0; i < width; i += LANES)
            store(packed + i / PANEL * PANEL * depth + j * PANEL + i % PANEL, load(chunk.rows[j] + i));
}
