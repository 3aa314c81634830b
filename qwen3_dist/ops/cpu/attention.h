// Paged attention with an online softmax (arXiv 2205.14135). A task is the queries of one KV group for some tokens of
// one sequence; it processes keys in chunks. With few queries, attention is limited by reading keys and values. A task
// then has several groups, so that it reads memory sequentially, which the CPU's prefetcher needs.
#pragma once

#include "chunk.h"
#include "few_rows.h"

struct AttentionShape {
    long sequences, heads, groups, dim, block_size, table_width, window;  // window 0: none
    float scale;
};

constexpr long TASK_ROWS = 512;  // queries of a task
constexpr long PART_ROWS = 32;   // queries of a part: its scores fit the L1 cache; keys that no query sees are skipped
constexpr long FEW_ROWS = 8;     // up to this number of rows of a group, keys and values are read in place
constexpr long FIXED_ROWS = 64;  // queries of a group in a task that reads keys in place in deterministic mode
constexpr long FEW_TASKS = 2;    // least number of tasks of few rows for each thread
constexpr float LOWEST = -1e30f;  // below all scores; unlike with -infinity, LOWEST - LOWEST is 0

template <class T, class C>
struct Attention {
    using P = Input<T>;  // type of the inputs of products

    const T* q;              // [T, H, d]
    const C *keys, *values;  // [blocks, block_size, G, d]: T, or codes
    T* out;                  // [T, H, d]
    const int* tables;  // [rows, table_width] block tables of all running sequences
    const long *table_rows, *context_lens, *starts;  // [S] row of tables, [S], [S + 1] first row of q of each sequence
    AttentionShape shape;
    float value_scale;  // of codes

    struct Task {
        long s, g, groups, first, count;  // sequence, first group, groups, tokens
    };

    long per_group() const { return shape.heads / shape.groups; }
    // The offset in q of row r of a task. Rows are ordered by group, then token, then head of the group.
    long row_of(const Task& task, long r) const {
        long rows = task.count * per_group(), token = starts[task.s] + task.first + r % rows / per_group();
        return (token * shape.heads + (task.g + r / rows) * per_group() + r % per_group()) * shape.dim;
    }
    // The offset of the K or V of a token. Tokens that follow in its block are `stride()` apart.
    long place(const Task& task, long token) const {
        long block = tables[table_rows[task.s] * shape.table_width + token / shape.block_size];
        return ((block * shape.block_size + token % shape.block_size) * shape.groups + task.g) * shape.dim;
    }
    long stride() const { return shape.groups * shape.dim; }
    // dim, padded to whole vectors, tiles and panels
    long width() const { return (shape.dim + PANEL - 1) / PANEL * PANEL; }

    // Calls f(offset in the chunk, offset in the cache, tokens) for each run of the chunk's tokens in one block.
    template <class F>
    void runs(const Task& task, long key, long n, F f) const {
        for (long at = 0, some; at < n; at += some) {
            some = std::min(n - at, shape.block_size - (key + at) % shape.block_size);
            f(at, place(task, key + at), some);
        }
    }

    void run(const Task& task) const {
        long dim = shape.dim, window = shape.window, rows = task.count * per_group() * task.groups;
        long whole = (rows + LANES - 1) / LANES * LANES;
        bool few = is_few(task.count);
        long before = context_lens[task.s] - (starts[task.s + 1] - starts[task.s]);  // tokens before this step
        long last = before + task.first + task.count - 1;
        P* queries = scratch<P>(QUERIES, rows * width());
        float* sums = scratch(SUMS, rows * width());
        float *most = scratch(SEEN, 3 * whole), *mass = most + whole, *shrink = mass + whole;
        long* positions = scratch<long>(POSITIONS, rows);
        for (long r = 0; r < rows; r++) {
            convert_input(q + row_of(task, r), queries + r * width(), dim, width());
            positions[r] = before + task.first + r % (task.count * per_group()) / per_group();
        }
        std::fill(most, most + whole, LOWEST);
        std::fill(mass, mass + whole, 0.0f);
        std::fill(sums, sums + rows * width(), 0.0f);
        long seen_from = window ? std::max(0L, before + task.first - window + 1) : 0;
        if (FIXED_WAY) seen_from = seen_from / CHUNK * CHUNK;  // chunks begin where they do in any other task
        for (long key = seen_from; key <= last; key += CHUNK) {
            long n = std::min(CHUNK, last + 1 - key), depth = few ? n : padded<P>(n);
            // Turns the scores of rows [first, first + some) into softmax weights of `depth` values.
            auto update_softmax_of_rows = [&](long first, long some, float* scores, auto* weights, long ld) {
                for (long r = first; r < first + some; r += LANES)
                    update_softmax(std::min<long>(LANES, first + some - r), positions + r, key, n,
                                   scores + (r - first) * CHUNK, weights + (r - first) * ld, ld, depth, most + r,
                                   mass + r, shrink + r);
            };
            if (few) {
                float* scores = scratch(SCORES, rows * CHUNK);
                score_in_place(task, key, n, queries, scores);
                update_softmax_of_rows(0, rows, scores, scores, CHUNK);
                const C* then = keys + place(task, std::min(key + CHUNK, last));
                add_values_in_place(task, key, n, then, scores, shrink, sums);
                continue;
            }
            P* packed_keys = scratch<P>(PACKED_KEYS, CHUNK * width());
            P* packed_values = scratch<P>(PACKED_VALUES, width() * depth);
            pack_keys(chunk_of(task, keys, key, n), n, width(), packed_keys);
            pack_values(chunk_of(task, values, key, n), depth, width(), packed_values);
            float* scores = scratch(SCORES, PART_ROWS * CHUNK);
            long ldb = ::stride<P>(CHUNK);
            P* weights = scratch<P>(WEIGHTS, PART_ROWS * ldb);
            for (long first = 0; first < rows; first += PART_ROWS) {
                long some = std::min(PART_ROWS, rows - first);
                long seen = std::min(n, before + task.first + (first + some - 1) / per_group() + 1 - key);
                if (seen <= 0) continue;
                block_product<P>(queries + first * width(), width(), some, packed_keys, panels(seen), width(), scores,
                                 CHUNK);
                update_softmax_of_rows(first, some, scores, weights, ldb);
                for (long r = first; r < first + some; r++)
                    if (shrink[r] != 1) scale_row(sums + r * width(), shrink[r], width());
                for (long p = 0; p < panels(dim); p++)
                    block_product<P, true>(weights, ldb, some, packed_values + p * PANEL * depth, 1, padded<P>(seen),
                                           sums + first * width() + p * PANEL, width());
            }
        }
        for (long r = 0; r < rows; r++) {
            scale_row(sums + r * width(), value_scale / mass[r], width());
            convert_row(sums + r * width(), out + row_of(task, r), dim);
        }
    }

    static void scale_row(float* row, float by, long n) {
        for (long i = 0; i < n; i += LANES) store(row + i, load(row + i) * by);
    }

    bool is_few(long tokens) const { return FIXED_WAY || tokens * per_group() <= FEW_ROWS; }

    // Calls f(offset in the chunk, rows, tokens, ahead) for each run of the chunk's tokens in one block. The next run,
    // or `then` after the last run, is `ahead` bytes further on, for prefetching.
    template <class F>
    void streamed_runs(const Task& task, long key, long n, const C* cache, const C* then, F f) const {
        runs(task, key, n, [&](long at, long from, long some) {
            const C *rows = cache + from, *next = at + some < n ? cache + place(task, key + at + some) : then;
            f(at, rows, some, (const char*)next - (const char*)rows);
        });
    }

    // scores[r][j] = queries[r] . keys[j] for n keys and few rows.
    void score_in_place(const Task& task, long key, long n, const P* queries, float* scores) const {
        long rows = task.count * per_group(), dim = shape.dim;
        const C* then = values + place(task, key);
#ifdef __AMX_BF16__
        if constexpr (std::is_same_v<C, bf16>)
            if (!FIXED_WAY && dim == UnitScores::DIM && (shape.block_size | key) % UNIT_ROWS == 0 && has_matrix_unit()) {
                bf16* columns = scratch<bf16>(QUERY_COLUMNS, task.groups * rows * dim);
                UnitScores unit(rows);
                for (long g = 0; g < task.groups; g++)
                    unit.transpose(queries + g * rows * width(), width(), columns + g * rows * dim);
                return streamed_runs(task, key, n, keys, then, [&](long at, const C* from, long some, long ahead) {
                    for (long j = 0; j < some; j++) prefetch(from + j * stride(), task.groups * dim, ahead);
                    for (long j = 0; j < some; j += UNIT_ROWS)
                        for (long g = 0; g < task.groups; g++)
                            unit.score(columns + g * rows * dim, from + j * stride() + g * dim, stride(),
                                       std::min(UNIT_ROWS, some - j), scores + g * rows * CHUNK + at + j, CHUNK);
                });
            }
#endif
        streamed_runs(task, key, n, keys, then, [&](long at, const C* from, long some, long ahead) {
            for (long g = 0; g < task.groups; g++)
                score_all(queries + g * rows * width(), width(), rows, from + g * dim, stride(), some, dim, ahead,
                          scores + g * rows * CHUNK + at, CHUNK);
        });
    }

    Chunk<C, P> chunk_of(const Task& task, const C* cache, long key, long n) const {
        Chunk<C, P> chunk(scratch<P>(CHUNKED, (CHUNK + 1) * width()), width());
        runs(task, key, n, [&](long at, long from, long some) {
            for (long j = at; j < at + some; j++, from += stride()) chunk.set(j, cache + from, shape.dim, width());
        });
        return chunk;
    }

    // One step of the online softmax: turns the scores of up to LANES queries with n keys, from `key` on, into `depth`
    // weights each (`weights` may be `scores`), and sets `shrink` to the factor for the weights of earlier keys. A
    // query sees the keys up to its position.
    template <class I>
    void update_softmax(long queries, const long* positions, long key, long n, float* scores, I* weights, long ld,
                        long depth, float* most, float* mass, float* shrink) const {
        long from[LANES], to[LANES];
        Vec highest[LANES], total[LANES] = {};
        for (long r = 0; r < LANES; r++) {
            highest[r] = Vec{} - INFINITY;
            if (r >= queries) continue;
            float* score = scores + r * CHUNK;
            from[r] = shape.window ? std::clamp(positions[r] - shape.window + 1 - key, 0L, n) : 0;
            to[r] = std::max(from[r], std::min(positions[r] + 1 - key, n));
            std::fill(score, score + from[r], -INFINITY);
            std::fill(score + to[r], score + (to[r] + LANES - 1) / LANES * LANES, -INFINITY);
            for (long j = 0; j < to[r]; j += LANES) highest[r] = larger(highest[r], load(score + j));
        }
        Vec last = load(most), peak = larger(last, largest(highest) * shape.scale), by = exp(last - peak);
        store(most, peak);
        store(shrink, by);
        for (long r = 0; r < queries; r++) {
            long j = 0;
            for (; j < to[r]; j += LANES) {  // weights of unseen keys are set to 0 below
                Vec weight = exp(load(scores + r * CHUNK + j) * shape.scale - peak[r]);
                total[r] += weight;
                store(weights + r * ld + j, weight);
            }
            std::fill(weights + r * ld, weights + r * ld + from[r], I{});
            std::fill(weights + r * ld + to[r], weights + r * ld + std::max(j, depth), I{});
        }
        store(mass, load(mass) * by + ::sums(total));
    }

    // sums[r] = sums[r] * shrink[r] + sum over n values of weights[r][j] * values[j]. Prefetches `then`, which is read
    // next.
    void add_values_in_place(const Task& task, long key, long n, const C* then, const float* weights, float* shrink,
                             float* sums) const {
        long rows = task.count * per_group();
        streamed_runs(task, key, n, values, then, [&](long at, const C* from, long some, long ahead) {
            for (long g = 0; g < task.groups; g++)
                for (long r = g * rows; r < (g + 1) * rows; r += FEW_ROWS)
                    add_all<FEW_ROWS>(std::min(FEW_ROWS, (g + 1) * rows - r), weights + r * CHUNK + at, CHUNK,
                                      from + g * shape.dim, stride(), some, shape.dim, ahead, shrink + r,
                                      sums + r * width(), width());
            std::fill(shrink, shrink + task.groups * rows, 1.0f);  // applied by the first run
        });
    }

    void run(int threads) const {
        std::vector<Task> tasks;
        long step = std::max(1L, (FIXED_WAY ? FIXED_ROWS : TASK_ROWS) / per_group());
        long together = std::clamp(shape.sequences * shape.groups / (FEW_TASKS * threads), 1L, shape.groups);
        for (long s = 0; s < shape.sequences; s++)
            for (long g = 0; g < shape.groups; g++)  // one group after the other, so that its keys stay in a cache
                for (long end = starts[s + 1] - starts[s]; end > 0; end -= step) {  // tasks with most keys first
                    long count = std::min(step, end), groups = is_few(count) ? together : 1;
                    if (g % groups == 0)
                        tasks.push_back({s, g, std::min(groups, shape.groups - g), std::max(0L, end - step), count});
                }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (size_t t = 0; t < tasks.size(); t++) run(tasks[t]);
    }
};

// Attention over a layer's KV cache; the members are those of `Attention`.
template <class T>
void attend(const T* q, const Cache& cache, T* out, const int* tables, const long* table_rows, const long* context_lens,
            const long* starts, AttentionShape shape, int threads) {
    shape.scale *= cache.key_scale;
    with_numbers_of<T>(cache, [&](auto* numbers) {
        using C = std::remove_pointer_t<decltype(numbers)>;
        Attention<T, C>{q, (const C*)cache.keys, (const C*)cache.values, out, tables, table_rows, context_lens, starts,
                        shape, cache.value_scale}
            .run(threads);
    });
}
