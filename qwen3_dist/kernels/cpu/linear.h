// Products with weights as the checkpoint stores them, [out, in]: a block of outputs at a time, whose
// weights are read once, widened to fp32 in cache if there are enough rows to pay for it.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

constexpr long BLOCK_COLS = COLS * 4;  // outputs in a block
constexpr long BLOCK_ROWS = 96;        // rows whose fp32 inputs stay in a core's cache
constexpr long WIDEN_FROM = 4;         // rows from which on widening first is faster

inline float* scratch(int which, size_t count) {
    thread_local std::vector<float> buffers[4];
    if (buffers[which].size() < count) buffers[which].resize(count);
    return buffers[which].data();
}

// out[m][n] = x[m] . w[n] for one block of at most BLOCK_COLS rows of w.
template <class T>
inline void block_product(const float* x, long ldx, long rows, const T* w, long cols, long inner, float* out) {
    if (sizeof(T) == 4 || rows < WIDEN_FROM) {
        dots_all(x, ldx, rows, w, inner, cols, inner, out, BLOCK_COLS);
        return;
    }
    float* wide = scratch(0, BLOCK_COLS * inner);
    for (long n = 0; n < cols; n++) widen_row(w + n * inner, wide + n * inner, inner);
    dots_all(x, ldx, rows, wide, inner, cols, inner, out, BLOCK_COLS);
}

template <class T>
inline void widen_rows(const T* x, float* out, long count, int threads) {
    constexpr long PIECE = 4096;
#pragma omp parallel for num_threads(threads) if (count > 4 * PIECE)
    for (long at = 0; at < count; at += PIECE) widen_row(x + at, out + at, std::min(PIECE, count - at));
}

// y [M, N] = x [M, K] @ w [N, K]^T + bias [N]
template <class T>
void linear(const T* x, const T* w, const T* bias, T* y, long m_end, long n_end, long k_end, int threads) {
    std::vector<float> wide(m_end * k_end);
    widen_rows(x, wide.data(), m_end * k_end, threads);
    long blocks = (n_end + BLOCK_COLS - 1) / BLOCK_COLS;
    for (long m = 0; m < m_end; m += BLOCK_ROWS) {
        long rows = std::min(BLOCK_ROWS, m_end - m);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
        for (long block = 0; block < blocks; block++) {
            long n = block * BLOCK_COLS, cols = std::min(BLOCK_COLS, n_end - n);
            float out[BLOCK_ROWS * BLOCK_COLS];
            block_product(wide.data() + m * k_end, k_end, rows, w + n * k_end, cols, k_end, out);
            for (long i = 0; i < rows; i++)
                for (long j = 0; j < cols; j++)
                    narrow(rounded<T>(out[i * BLOCK_COLS + j]) + (bias ? widen(bias[n + j]) : 0),
                           y[(m + i) * n_end + n + j]);
        }
    }
}
