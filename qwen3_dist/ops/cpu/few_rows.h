// Products of attention for few queries, with keys and values read in place from the KV cache. Memory limits them, so
// each step prefetches what a later step reads, `ahead` bytes further on.
#pragma once

#include "cache.h"
#include "linear.h"

// Prefetches what is `ahead` bytes after the `count` values at p. Always inlined, since GCC 12 drops calls of a
// function that only prefetches.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* p, long count, long ahead) {
    for (long i = 0; i < count; i += LINE / sizeof(T)) __builtin_prefetch((const char*)(p + i) + ahead, 0, 2);
}

// sum + a * b in each lane, where a lane is a float, or a pair of bf16 whose products are added.
template <class T>
inline Vec multiply_add(Vec sum, const float* a, const T* b) { return sum + load(a) * load(b); }
#ifdef __AVX512BF16__
inline Vec multiply_add(Vec sum, const bf16* a, const bf16* b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
}
#endif

// scores[r][j] = queries[r] . keys[j] for R rows and the first `some` of LANES / R keys.
template <int R, class P, class T>
inline void score_rows(const P* queries, long ldq, const T* keys, long ldk, long some, long dim, long ahead,
                       float* scores, long lds) {
    constexpr int KEYS = LANES / R;
    constexpr long STEP = LANES * sizeof(float) / sizeof(P);
    Vec acc[LANES] = {};
    const T* rows[KEYS];
    for (int j = 0; j < KEYS; j++) rows[j] = keys + std::min<long>(j, some - 1) * ldk;
    long k = 0;
    for (; k + STEP <= dim; k += STEP)
        for (int j = 0; j < KEYS; j++) {
            prefetch(rows[j] + k, STEP, ahead);
            for (int r = 0; r < R; r++) {
                Vec& sum = acc[r * KEYS + j];
                sum = multiply_add(sum, queries + r * ldq + k, rows[j] + k);
            }
        }
    Vec found = sums(acc);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < std::min<long>(KEYS, some); j++) {
            float rest = 0;
            for (long i = k; i < dim; i++) rest += widen(queries[r * ldq + i]) * widen(rows[j][i]);
            scores[r * lds + j] = found[r * KEYS + j] + rest;
        }
}

// scores[r][j] = queries[r] . keys[j] for any number of rows and n keys.
template <class P, class T>
inline void score_all(const P* queries, long ldq, long rows, const T* keys, long ldk, long n, long dim, long ahead,
                      float* scores, long lds) {
    long r = 0;
    for (; r + 2 <= rows; r += 2)
        for (long j = 0; j < n; j += LANES / 2)
            score_rows<2>(queries + r * ldq, ldq, keys + j * ldk, ldk, n - j, dim, ahead, scores + r * lds + j, lds);
    for (long j = 0; r < rows && j < n; j += LANES)
        score_rows<1>(queries + r * ldq, ldq, keys + j * ldk, ldk, n - j, dim, ahead, scores + r * lds + j, lds);
}

// sum[m] = sum[m] * shrink[m] + sum over j < n of by[m][j] * rows[j], for M rows of `sum`.
template <int M, class T>
inline void add_rows(const float* by, long ldby, const T* rows, long ld, long n, long dim, long ahead,
                     const float* shrink, float* sum, long lds) {
    long i = 0;
    for (; i + 2 * LANES <= dim; i += 2 * LANES) {
        Vec low[M], high[M];
        for (int m = 0; m < M; m++) {
            low[m] = load(sum + m * lds + i) * shrink[m];
            high[m] = load(sum + m * lds + i + LANES) * shrink[m];
        }
        for (long j = 0; j < n; j++) {
            const T* row = rows + j * ld + i;
            prefetch(row, 2 * LANES, ahead);
            Vec left = load(row), right = load(row + LANES);
            for (int m = 0; m < M; m++) low[m] += left * by[m * ldby + j], high[m] += right * by[m * ldby + j];
        }
        for (int m = 0; m < M; m++) store(sum + m * lds + i, low[m]), store(sum + m * lds + i + LANES, high[m]);
    }
    for (; i < dim; i++)
        for (int m = 0; m < M; m++) {
            sum[m * lds + i] *= shrink[m];
            for (long j = 0; j < n; j++) sum[m * lds + i] += widen(rows[j * ld + i]) * by[m * ldby + j];
        }
}

// `add_rows` for `count` <= M rows of `sum`, which reads `rows` once.
template <int M, class T>
inline void add_all(long count, const float* by, long ldby, const T* rows, long ld, long n, long dim, long ahead,
                    const float* shrink, float* sum, long lds) {
    if constexpr (M > 1)
        if (count < M) return add_all<M - 1>(count, by, ldby, rows, ld, n, dim, ahead, shrink, sum, lds);
    add_rows<M>(by, ldby, rows, ld, n, dim, ahead, shrink, sum, lds);
}
