// Products with packed weights. Weights are packed in panels of PANEL outputs, so that a product reads them
// sequentially:
//
//   multiplied as fp32   [outputs / PANEL][inputs][PANEL]
//   multiplied as bf16   [outputs / PANEL][inputs / 2][PANEL][2]   two inputs of an output in one word
//
// Of codes of 4 bits, a byte has the word's two inputs of an output; where they are multiplied as fp32, it has the codes
// of an output of the lower half of a panel and of one of the upper half. The first is in the lower bits.
//
// Outputs and inputs are padded with zeros to whole panels, pairs and tiles of the matrix unit.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "matrix_unit.h"
#include "narrow_weights.h"
#include "simd.h"

constexpr long PANEL = 2 * LANES;                    // outputs of a register tile
constexpr int TILE_ROWS = LANES == 16 ? 12 : 6;      // rows of a register tile
constexpr long BLOCK_PANELS = 4;                     // panels of a task
constexpr long BLOCK_COLS = BLOCK_PANELS * PANEL;
constexpr long BLOCK_ROWS = 256;                     // rows of a task
constexpr long BLOCK_SUMS = BLOCK_ROWS * PANEL;      // outputs that are computed before they are used further

// The input type of products with weights W.
template <class W>
using Input = std::conditional_t<MULTIPLIES_BF16 && std::is_same_v<Wide<W>, bf16>, bf16, float>;

template <class W>
constexpr long PAIR = std::is_same_v<Wide<W>, bf16> ? 2 : 1;  // inputs of an output in one word

template <class W>
constexpr long DEPTH_STEP = std::is_same_v<Wide<W>, bf16> ? TILE_INPUTS : PER_ITEM<W>;

template <class W>
inline long padded(long inner) { return (inner + DEPTH_STEP<W> - 1) / DEPTH_STEP<W> * DEPTH_STEP<W>; }

// Distance between rows of inputs. Not a power of two: then all rows would share a few sets of the cache.
template <class W>
inline long stride(long depth) { return padded<W>(depth) + (std::is_same_v<Input<W>, bf16> ? TILE_INPUTS : 0); }

inline long panels(long outputs) { return (outputs + PANEL - 1) / PANEL; }

// Buffers of each thread. They are kept, since allocating memory takes as long as the work on it.
enum Buffer {
    ROW, QUERIES, SUMS, SCORES, QUERY_COLUMNS, WEIGHTS, PACKED_KEYS, PACKED_VALUES, SEEN, POSITIONS, CHUNKED, INPUTS,
    HIDDEN, OUTPUTS, NORMED, Q, K, V, ATTENDED, PARTIAL, WIDENED, ROTATED, BUFFERS
};

constexpr size_t LINE = 64;  // bytes of a cache line; unaligned tiles take the matrix unit twice as long to load
constexpr long PREFETCH_BYTES = 8192;  // bytes between weights in use and weights that are prefetched
// From this number of rows on, weights are prefetched; else the hardware prefetcher is enough. That of CPUs with a
// matrix unit is not: int8 weights arrive half as fast.
#ifdef __AMX_BF16__
constexpr int PREFETCH_ROWS = 1;
#else
constexpr int PREFETCH_ROWS = 3;
#endif
// Up to WAITING_ROWS rows, memory limits a product. If they take several tiles, these do few inputs at a time, so that
// weights that the first tile prefetches arrive during the others.
constexpr long WAITING_ROWS = 20, WAITING_INPUTS = 128;
// up to this number of rows, each tile widens narrow weights in registers, unless the matrix unit multiplies
constexpr long WIDENED_AFTER = 3 * TILE_ROWS;
// from this number of rows on, int8 weights are widened for the matrix unit
constexpr long WIDENED_FROM = 8;

template <class T = float>
inline T* scratch(Buffer which, size_t count) {
    thread_local std::vector<char> buffers[BUFFERS];
    if (buffers[which].size() < count * sizeof(T) + LINE) buffers[which].resize(count * sizeof(T) + LINE);
    auto address = reinterpret_cast<uintptr_t>(buffers[which].data());
    return reinterpret_cast<T*>((address + LINE - 1) / LINE * LINE);
}

// Divides tasks among threads: each thread does its own consecutive tasks, which read memory sequentially, and then
// tasks that other threads have not started.
class SharedTasks {
public:
    SharedTasks(long count, int threads) : count(count), next(threads) {
        for (int t = 0; t < threads; t++) next[t] = begin(t);
    }

    // Runs tasks until none is left. Every thread calls it.
    template <class F>
    void run(F f) {
        int threads = int(next.size()), me = omp_get_thread_num();
        for (int i = 0; i < threads; i++) {
            int whose = (me + i) % threads;
            for (long task; (task = next[whose]++) < begin(whose + 1);) f(task);
        }
    }

private:
    long begin(int thread) const { return count * thread / long(next.size()); }

    long count;
    std::vector<std::atomic<long>> next;
};

template <class W>
void pack(const W* w, W* out, long outputs, long inner, int threads) {
    long depth = padded<W>(inner);
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < panels(outputs); p++)
        for (long k = 0; k < depth; k++)
            for (long c = 0; c < PANEL; c++) {
                long n = p * PANEL + c;
                out[p * PANEL * depth + k / PAIR<W> * PAIR<W> * PANEL + c * PAIR<W> + k % PAIR<W>] =
                    n < outputs && k < inner ? w[n * inner + k] : W{};
            }
}

// out [count, inner] = rows `ids` of a packed matrix.
template <class W>
void packed_rows(const W* packed, const long* ids, W* out, long count, long inner, int threads) {
    long depth = padded<W>(inner);
#pragma omp parallel for num_threads(threads) if (count > 1)
    for (long r = 0; r < count; r++) {
        const W* from = packed + ids[r] / PANEL * PANEL * depth + ids[r] % PANEL * PAIR<W>;
        for (long k = 0; k < inner; k++)
            out[r * inner + k] = from[k / PAIR<W> * PAIR<W> * PANEL + k % PAIR<W>];
    }
}

// acc[m][h] += PAIR inputs of x[m] times their weights of half panel h.
template <int M, class W>
inline void multiply(Vec (&acc)[M][2], const float* x, long ldx, const W* w, long k) {
    Vec low = load(w + k * PANEL), high = load(w + k * PANEL + LANES);
    for (int m = 0; m < M; m++) {
        acc[m][0] += low * x[m * ldx + k];
        acc[m][1] += high * x[m * ldx + k];
    }
}

#ifdef __AVX512BF16__
template <int M, class W>
inline void multiply(Vec (&acc)[M][2], const bf16* x, long ldx, const W* w, long k) {
    __m512bh low = load_pairs(w + k * PANEL), high = load_pairs(w + k * PANEL + 2 * LANES);
    for (int m = 0; m < M; m++) {
        int pair;
        memcpy(&pair, x + m * ldx + k, 4);
        auto input = (__m512bh)_mm512_set1_epi32(pair);
        acc[m][0] = (Vec)_mm512_dpbf16_ps((__m512)acc[m][0], input, low);
        acc[m][1] = (Vec)_mm512_dpbf16_ps((__m512)acc[m][1], input, high);
    }
}
#endif

// out[m][n] = x[m] . w[n] for M rows and a panel, or += if it ADDS. Prefetches weights, since for several rows the CPU
// would wait for memory and multiply only then. Not inlined, so that it has all registers.
template <int M, bool ADDS, class W>
[[gnu::noinline]] void tile(const Input<W>* x, long ldx, const W* w, long depth, float* out, long ldo) {
    Vec acc[M][2] = {};
    for (int m = 0; ADDS && m < M; m++)
        for (int h = 0; h < 2; h++) acc[m][h] = load(out + m * ldo + h * LANES);
    for (long k = 0; k < depth; k += PAIR<W>) {
        for (size_t at = 0; M >= PREFETCH_ROWS && at < PANEL * PAIR<W> * sizeof(W); at += LINE)
            __builtin_prefetch((const char*)(w + k * PANEL) + PREFETCH_BYTES + at, 0, 2);
        multiply<M>(acc, x, ldx, w, k);
    }
    for (int m = 0; m < M; m++)
        for (int h = 0; h < 2; h++) store(out + m * ldo + h * LANES, acc[m][h]);
}

// `tile` for up to TILE_ROWS rows and `count` panels, one after the other, so that weights are read sequentially.
template <class W, bool ADDS, int M = TILE_ROWS>
inline void tile_of(long rows, const Input<W>* x, long ldx, const W* w, long count, long depth, float* out, long ldo) {
    if constexpr (M > 1)
        if (rows < M) return tile_of<W, ADDS, M - 1>(rows, x, ldx, w, count, depth, out, ldo);
    for (long p = 0; p < count; p++) tile<M, ADDS>(x, ldx, w + p * PANEL * depth, depth, out + p * PANEL, ldo);
}

inline void ignore(long, long, long, long) {}

inline bool uses_matrix_unit(long rows) {
#ifdef __AMX_BF16__
    return (rows > 1 || FIXED_WAY) && has_matrix_unit();
#else
    return false;
#endif
}

// out[m][n] = x[m] . w[n], or += if it ADDS, for some rows and panels. Tiles have about the same size, since a last
// tile of few rows would cost almost as much as a full one. Calls done(p, count, m, n) as soon as the outputs of
// `count` panels from p on are complete for rows [m, m + n), while they are in a cache.
template <class W, bool ADDS = false, class F = decltype(ignore)>
inline void block_product(const Input<W>* x, long ldx, long rows, const W* w, long count, long depth, float* out,
                          long ldo, F done = ignore) {
    if constexpr (IS_NARROW<W>)
        if (rows > WIDENED_AFTER || ((rows >= WIDENED_FROM || FIXED_WAY) && uses_matrix_unit(rows))) {
            auto wide = scratch<Wide<W>>(WIDENED, PANEL * depth);
            for (long p = 0; p < count; p++) {
                widen_weights(w + p * PANEL * depth, wide, PANEL * depth);
                block_product<Wide<W>, ADDS>(x, ldx, rows, wide, 1, depth, out + p * PANEL, ldo,
                                             [&](long, long, long m, long some) { done(p, 1, m, some); });
            }
            return;
        }
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<W, bf16>)
        if (uses_matrix_unit(rows)) return unit_block<ADDS>(x, ldx, rows, w, count, PANEL, depth, out, ldo, done);
#endif
    long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    bool waits = MULTIPLIES_BF16 && std::is_same_v<W, bf16> && tiles > 1 && rows <= WAITING_ROWS;
    long together = waits ? 1 : count, step = waits ? WAITING_INPUTS : depth;
    for (long p = 0; p < count; p += together)
        for (long k = 0; k < depth; k += step)
            for (long t = 0, m = 0; t < tiles; t++) {
                long some = (rows - m) / (tiles - t), inputs = std::min(step, depth - k);
                auto product = ADDS || k ? tile_of<W, true> : tile_of<W, false>;
                product(some, x + m * ldx + k, ldx, w + p * PANEL * depth + k * PANEL, together, inputs,
                        out + m * ldo + p * PANEL, ldo);
                if (k + step >= depth) done(p, together, m, some);
                m += some;
            }
}
