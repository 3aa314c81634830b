// Products of bf16 in the CPU's matrix unit (Intel AMX). It multiplies tiles in a few cycles: up to 16 rows of 32
// inputs with the weights of 16 outputs. A packed panel is two such tiles of weights.
#pragma once

#include <algorithm>

#include "simd.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

constexpr long TILE_INPUTS = 32;  // inputs of a tile
constexpr long UNIT_ROWS = 16;    // rows of a tile
constexpr long UNIT_INPUTS = 256;  // inputs at a time, if there are many rows
// inputs between weights in use and weights that are prefetched, if there are few rows
constexpr long UNIT_PREFETCH_INPUTS = 128;

// Whether Linux lets this process use the unit. A process must request it, since the unit's state is large.
inline bool has_matrix_unit() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// Tiles 0 to 3 are sums (upper and lower rows, for both halves of a panel), 4 and 5 inputs, 6 and 7 weights.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    TileShapes(long upper, long lower) {
        const long of_each[8] = {upper, upper, lower, lower, upper, lower, UNIT_ROWS, UNIT_ROWS};
        for (int t = 0; t < 8; t++) {
            rows[t] = uint8_t(of_each[t]);
            bytes[t] = of_each[t] ? 64 : 0;
        }
    }

    void load() const {
        asm volatile("" ::"m"(*this));  // GCC 12 assumes that the instruction reads 8 bytes
        _tile_loadconfig(this);
    }
};

// Multiplies `depth` inputs of up to 32 rows with a panel and adds the result to `out`, or stores it if these inputs
// are the `first`. Prefetches `ahead` cache lines from `next` on in each step.
template <bool LOWER>
inline void unit_product(const bf16* upper, const bf16* lower, long ldx, const bf16* panel, long width, long depth,
                         bool first, float* out, float* lower_out, long ldo, const char* next, long ahead) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (LOWER) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, out, ldo * 4);
        _tile_loadd(1, out + width / 2, ldo * 4);
        if constexpr (LOWER) {
            _tile_loadd(2, lower_out, ldo * 4);
            _tile_loadd(3, lower_out + width / 2, ldo * 4);
        }
    }
    for (long k = 0; k < depth; k += TILE_INPUTS) {
        const bf16* weights = panel + k * width;
        _tile_loadd(4, upper + k, ldx * 2);
        _tile_loadd(6, weights, width * 4);
        _tile_loadd(7, weights + width, width * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        for (long line = 0; line < ahead; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        if constexpr (LOWER) {
            _tile_loadd(5, lower + k, ldx * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, ldo * 4);
    _tile_stored(1, out + width / 2, ldo * 4);
    if constexpr (LOWER) {
        _tile_stored(2, lower_out, ldo * 4);
        _tile_stored(3, lower_out + width / 2, ldo * 4);
    }
}

// out[m][n] = x[m] . w[n], or += if it ADDS, for some rows and `count` panels of `width` = 32 outputs; depth is a
// multiple of 32. Many rows are multiplied with few inputs at a time, so that a panel's weights stay in the L1 cache.
// Calls done(p, 1, m, n) when panel p's outputs are complete for rows [m, m + n).
template <bool ADDS, class F>
inline void unit_block(const bf16* x, long ldx, long rows, const bf16* w, long count, long width, long depth, float* out,
                       long ldo, F done) {
    asm volatile("" ::: "memory");  // tells the compiler that tiles are loaded from memory
    constexpr long GROUP = 2 * UNIT_ROWS;
    long groups = (rows + GROUP - 1) / GROUP, last = rows - (groups - 1) * GROUP;
    long upper = last > UNIT_ROWS ? (last + 1) / 2 : last, step = groups > 1 ? UNIT_INPUTS : depth;
    const TileShapes whole(UNIT_ROWS, UNIT_ROWS), rest(upper, last - upper);
    // No prefetching for few inputs: their weights are in a cache already.
    long ahead = depth > UNIT_INPUTS ? (width * TILE_INPUTS * 2 / 64 + groups - 1) / groups : 0;
    bool even = groups == 1 || last == GROUP;
    rest.load();
    for (long p = 0; p < count; p++)
        for (long k = 0; k < depth; k += step) {
            bool first = !ADDS && !k;
            long some = std::min(step, depth - k);
            const bf16* panel = w + p * width * depth + k * width;
            const char* next = (const char*)(panel + (groups > 1 ? some : UNIT_PREFETCH_INPUTS) * width);
            if (!even) whole.load();
            for (long g = 0; g < groups; g++, next += ahead * some / TILE_INPUTS * 64) {
                const bf16* above = x + g * GROUP * ldx + k;
                float* sums = out + g * GROUP * ldo + p * width;
                bool is_last = g == groups - 1;
                long in_upper = is_last ? upper : UNIT_ROWS;
                if (is_last && !even) rest.load();
                const bf16* below = above + in_upper * ldx;
                float* below_sums = sums + in_upper * ldo;
                if (is_last && last == upper)
                    unit_product<false>(above, below, ldx, panel, width, some, first, sums, below_sums, ldo, next, ahead);
                else
                    unit_product<true>(above, below, ldx, panel, width, some, first, sums, below_sums, ldo, next, ahead);
                if (k + some == depth) {
                    asm volatile("" ::: "memory");
                    done(p, 1, g * GROUP, is_last ? last : GROUP);
                }
            }
        }
    _tile_release();
}

// Products of few queries with keys that are read in place: up to 16 keys are the rows of one tile, the queries are the
// columns of another. Tiles 0 and 1 are sums of even and odd steps, 2 and 3 keys, 4 to 7 queries. The unit stays
// configured for the object's lifetime.
class UnitScores {
public:
    static constexpr long DIM = 4 * TILE_INPUTS;  // of a query

    explicit UnitScores(long queries) : queries(queries) {
        TileShapes shapes(UNIT_ROWS, UNIT_ROWS);
        for (int t : {0, 1, 4, 5, 6, 7}) shapes.bytes[t] = uint16_t(queries * 4);
        shapes.load();
    }
    ~UnitScores() { _tile_release(); }

    // Transposes the queries to columns: [DIM / 2][queries][2].
    void transpose(const bf16* rows, long ld, bf16* columns) const {
        for (long k = 0; k < DIM; k += 2)
            for (long r = 0; r < queries; r++, columns += 2) memcpy(columns, rows + r * ld + k, 4);
    }

    // scores[r][j] = queries[r] . keys[j] for the first `some` of 16 keys.
    void score(const bf16* columns, const bf16* keys, long ldk, long some, float* scores, long lds) const {
        alignas(64) float even[UNIT_ROWS * UNIT_ROWS], odd[UNIT_ROWS * UNIT_ROWS];
        asm volatile("" ::: "memory");
        const long step = TILE_INPUTS * queries, ld = queries * 4;
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(2, keys, ldk * 2);
        _tile_loadd(4, columns, ld);
        _tile_dpbf16ps(0, 2, 4);
        _tile_loadd(3, keys + TILE_INPUTS, ldk * 2);
        _tile_loadd(5, columns + step, ld);
        _tile_dpbf16ps(1, 3, 5);
        _tile_loadd(2, keys + 2 * TILE_INPUTS, ldk * 2);
        _tile_loadd(6, columns + 2 * step, ld);
        _tile_dpbf16ps(0, 2, 6);
        _tile_loadd(3, keys + 3 * TILE_INPUTS, ldk * 2);
        _tile_loadd(7, columns + 3 * step, ld);
        _tile_dpbf16ps(1, 3, 7);
        _tile_stored(0, even, ld);
        _tile_stored(1, odd, ld);
        asm volatile("" ::: "memory");
        for (long r = 0; r < queries; r++)
            for (long j = 0; j < some; j++) scores[r * lds + j] = even[j * queries + r] + odd[j * queries + r];
    }

private:
    long queries;
};
#else
constexpr long TILE_INPUTS = 2;
inline bool has_matrix_unit() { return false; }
#endif
