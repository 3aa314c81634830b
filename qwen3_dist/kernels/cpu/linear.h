// Products with weights as the checkpoint stores them, [out, in], a block of outputs at a time: for few rows
// by dot products with the weights where they lie, for many with the block widened and turned in cache.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

constexpr long PANEL = 2 * LANES;      // outputs that a register tile holds
constexpr long BLOCK_COLS = 3 * PANEL; // outputs in a block
constexpr long BLOCK_ROWS = 192;       // rows that share a turned block
constexpr long DEPTH = 256;            // inputs of a panel, which stays in a core's first-level cache
constexpr long WIDEN_FROM = 4;         // rows from which on widening first is faster
constexpr long TURN_FROM = 12;         // rows from which on turning is

// Outputs in a block: for few rows small ones, so that every thread has some.
inline long block_cols(long rows) { return rows >= TURN_FROM ? BLOCK_COLS : 4 * COLS; }

inline float* scratch(int which, size_t count) {
    thread_local std::vector<float> buffers[4];
    if (buffers[which].size() < count) buffers[which].resize(count);
    return buffers[which].data();
}

// panel[k][n] = w[n][k] for up to PANEL rows of w; the rest are zeros.
template <class W>
inline void turn(const W* w, long ldw, long cols, long depth, float* panel) {
    float wide[PANEL][LANES];
    for (long k = 0; k < depth; k += LANES) {
        long count = std::min(long(LANES), depth - k);
        for (long n = 0; n < PANEL; n++)
            if (n < cols)
                widen_row(w + n * ldw + k, wide[n], count);
            else
                std::fill(wide[n], wide[n] + LANES, 0.0f);
        for (long i = 0; i < count; i++)
            for (long n = 0; n < PANEL; n++) panel[(k + i) * PANEL + n] = wide[n][i];
    }
}

// out[m][n] += sum over k of x[m][k] * panel[k][n] for M rows.
template <int M>
inline void add_tile(const float* x, long ldx, const float* panel, long depth, float* out) {
    Vec low[M], high[M];
    for (int m = 0; m < M; m++) low[m] = load(out + m * BLOCK_COLS), high[m] = load(out + m * BLOCK_COLS + LANES);
    for (long k = 0; k < depth; k++) {
        Vec left = load(panel + k * PANEL), right = load(panel + k * PANEL + LANES);
        for (int m = 0; m < M; m++) {
            float by = x[m * ldx + k];
            low[m] += left * by, high[m] += right * by;
        }
    }
    for (int m = 0; m < M; m++) store(out + m * BLOCK_COLS, low[m]), store(out + m * BLOCK_COLS + LANES, high[m]);
}

inline void add_rows(const float* x, long ldx, long rows, const float* panel, long depth, float* out) {
    constexpr int M = LANES == 16 ? 12 : 6;
    long m = 0;
    for (; m + M <= rows; m += M) add_tile<M>(x + m * ldx, ldx, panel, depth, out + m * BLOCK_COLS);
    for (; m + 3 <= rows; m += 3) add_tile<3>(x + m * ldx, ldx, panel, depth, out + m * BLOCK_COLS);
    for (; m < rows; m++) add_tile<1>(x + m * ldx, ldx, panel, depth, out + m * BLOCK_COLS);
}

// out[m][n] = x[m] . w[n] for one block of at most BLOCK_COLS rows of w.
template <class W>
inline void block_product(const float* x, long ldx, long rows, const W* w, long cols, long inner, float* out) {
    if (rows >= TURN_FROM) {
        float* panels = scratch(0, DEPTH * BLOCK_COLS);
        std::fill(out, out + rows * BLOCK_COLS, 0.0f);
        for (long k = 0; k < inner; k += DEPTH) {
            long depth = std::min(DEPTH, inner - k);
            for (long n = 0; n < cols; n += PANEL)
                turn(w + n * inner + k, inner, std::min(PANEL, cols - n), depth, panels + n * DEPTH);
            for (long n = 0; n < cols; n += PANEL) add_rows(x + k, ldx, rows, panels + n * DEPTH, depth, out + n);
        }
    } else if (sizeof(W) == 4 || rows < WIDEN_FROM) {
        dots_all(x, ldx, rows, w, inner, cols, inner, out, BLOCK_COLS);
    } else {
        float* wide = scratch(0, BLOCK_COLS * inner);
        for (long n = 0; n < cols; n++) widen_row(w + n * inner, wide + n * inner, inner);
        dots_all(x, ldx, rows, wide, inner, cols, inner, out, BLOCK_COLS);
    }
}

template <class T>
inline void widen_rows(const T* x, float* out, long count, int threads) {
    constexpr long PIECE = 4096;
#pragma omp parallel for num_threads(threads) if (count > 4 * PIECE)
    for (long at = 0; at < count; at += PIECE) widen_row(x + at, out + at, std::min(PIECE, count - at));
}

// y [M, n] = x [M, K] @ w [n, K]^T * scales [n] + bias [n]; scales and bias may be null.
template <class T, class W>
struct Product {
    const W* w;
    const float* scales;
    const T* bias;
    long n;
    T* y;

    // Outputs [at, at + cols) for rows [m, m + rows) of x.
    void block(const float* x, long m, long rows, long inner, long at, long cols) const {
        float out[BLOCK_ROWS * BLOCK_COLS];
        block_product(x + m * inner, inner, rows, w + at * inner, cols, inner, out);
        for (long i = 0; i < rows; i++)
            for (long j = 0; j < cols; j++) {
                float product = rounded<T>(out[i * BLOCK_COLS + j] * (scales ? scales[at + j] : 1));
                narrow(product + (bias ? widen(bias[at + j]) : 0), y[(m + i) * n + at + j]);
            }
    }
};

// Up to three products of the same x in one go.
template <class T, class W>
void linear(const T* x, const std::vector<Product<T, W>>& products, long m_end, long inner, int threads) {
    std::vector<float> wide(m_end * inner);
    widen_rows(x, wide.data(), m_end * inner, threads);
    struct Task {
        const Product<T, W>* product;
        long m, rows, at, cols;
    };
    std::vector<Task> tasks;
    long width = block_cols(m_end);
    for (long m = 0; m < m_end; m += BLOCK_ROWS)
        for (const auto& product : products)
            for (long at = 0; at < product.n; at += width)
                tasks.push_back({&product, m, std::min(BLOCK_ROWS, m_end - m), at, std::min(width, product.n - at)});
#pragma omp parallel for num_threads(threads) schedule(dynamic, 2)
    for (size_t t = 0; t < tasks.size(); t++) {
        auto [product, m, rows, at, cols] = tasks[t];
        product->block(wide.data(), m, rows, inner, at, cols);
    }
}
