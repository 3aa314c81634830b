// Attention over KV blocks where they lie, with a running softmax (arXiv 2205.14135): a task is the
// queries of one KV group for some tokens of one sequence, and takes its keys a chunk at a time.
// Where the queries are few, reading keys and values is what takes the time. A task then has several groups, so
// that it reads in the order in which they lie: the CPU foresees no leaps.
#pragma once

#include "chunk.h"
#include "few_rows.h"

struct AttentionShape {
    long sequences, heads, groups, dim, block_size, table_width, window;  // window 0: none
    float scale;
};

constexpr long TASK_ROWS = 512;  // of queries
constexpr long PART_ROWS = 32;   // of these, whose scores the first cache keeps; what none of them sees is left out
constexpr long FEW_ROWS = 8;     // up to so many rows of a group, keys and values are used where they lie
constexpr long FEW_TASKS = 2;    // of few rows that each thread should find
constexpr float LOWEST = -1e30f;  // below all scores; unlike infinity it may be taken from itself

template <class T>
struct Attention {
    using P = Input<T>;  // what products take

    const T *q, *keys, *values;  // q [T, H, d]; keys, values [blocks, block_size, G, d]
    T* out;                      // [T, H, d]
    const int* tables;  // [rows, table_width], the blocks of all running sequences
    const long *table_rows, *context_lens, *starts;  // [S] a sequence's row of tables, [S], [S + 1] its first row of q
    AttentionShape shape;

    struct Task {
        long s, g, groups, first, count;  // sequence, first group, groups, tokens
    };

    long per_group() const { return shape.heads / shape.groups; }
    // Rows of a task are those of its first group, of each of its tokens in turn, then those of the next.
    long row_of(const Task& task, long r) const {
        long rows = task.count * per_group(), token = starts[task.s] + task.first + r % rows / per_group();
        return (token * shape.heads + (task.g + r / rows) * per_group() + r % per_group()) * shape.dim;
    }
    // Where the K or V of a token lies; those that follow in its block are `stride()` further on each.
    long place(const Task& task, long token) const {
        long block = tables[table_rows[task.s] * shape.table_width + token / shape.block_size];
        return ((block * shape.block_size + token % shape.block_size) * shape.groups + task.g) * shape.dim;
    }
    long stride() const { return shape.groups * shape.dim; }
    long width() const { return (shape.dim + PANEL - 1) / PANEL * PANEL; }  // whole vectors, tiles and panels

    // Calls f(offset in the chunk, place, tokens) for each run of the chunk's tokens that lie in one block.
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
        long before = context_lens[task.s] - (starts[task.s + 1] - starts[task.s]);  // tokens ahead of this step
        long last = before + task.first + task.count - 1;
        P* queries = scratch<P>(QUERIES, rows * width());
        float* sums = scratch(SUMS, rows * width());
        float *most = scratch(SEEN, 3 * whole), *mass = most + whole, *shrink = mass + whole;
        long* positions = scratch<long>(POSITIONS, rows);
        for (long r = 0; r < rows; r++) {
            put_row(q + row_of(task, r), queries + r * width(), dim, width());
            positions[r] = before + task.first + r % (task.count * per_group()) / per_group();
        }
        std::fill(most, most + whole, LOWEST);
        std::fill(mass, mass + whole, 0.0f);
        std::fill(sums, sums + rows * width(), 0.0f);
        for (long key = window ? std::max(0L, before + task.first - window + 1) : 0; key <= last; key += CHUNK) {
            long n = std::min(CHUNK, last + 1 - key), depth = few ? n : padded<P>(n);
            // Of the keys that rows [first, first + some) see, their scores become weights of `depth` values.
            auto soften_rows = [&](long first, long some, float* scores, auto* weights, long ld) {
                for (long r = first; r < first + some; r += LANES)
                    soften(std::min<long>(LANES, first + some - r), positions + r, key, n, scores + (r - first) * CHUNK,
                           weights + (r - first) * ld, ld, depth, most + r, mass + r, shrink + r);
            };
            if (few) {
                float* scores = scratch(SCORES, rows * CHUNK);
                score_in_place(task, key, n, queries, scores);
                soften_rows(0, rows, scores, scores, CHUNK);
                const T* then = keys + place(task, std::min(key + CHUNK, last));
                add_values_in_place(task, key, n, then, scores, shrink, sums);
                continue;
            }
            P *laid = scratch<P>(LAID, CHUNK * width()), *laid_values = scratch<P>(LAID_VALUES, width() * depth);
            lay_keys(chunk_of(task, keys, key, n), n, width(), laid);
            lay_values(chunk_of(task, values, key, n), depth, width(), laid_values);
            float* scores = scratch(SCORES, PART_ROWS * CHUNK);
            long ldb = ::stride<P>(CHUNK);
            P* weights = scratch<P>(WEIGHTS, PART_ROWS * ldb);
            for (long first = 0; first < rows; first += PART_ROWS) {
                long some = std::min(PART_ROWS, rows - first);
                long seen = std::min(n, before + task.first + (first + some - 1) / per_group() + 1 - key);
                if (seen <= 0) continue;
                block_product<P>(queries + first * width(), width(), some, laid, panels(seen), width(), scores, CHUNK);
                soften_rows(first, some, scores, weights, ldb);
                for (long r = first; r < first + some; r++)
                    if (shrink[r] != 1) scale_row(sums + r * width(), shrink[r], width());
                for (long p = 0; p < panels(dim); p++)
                    block_product<P, true>(weights, ldb, some, laid_values + p * PANEL * depth, 1, padded<P>(seen),
                                           sums + first * width() + p * PANEL, width());
            }
        }
        for (long r = 0; r < rows; r++) {
            scale_row(sums + r * width(), 1 / mass[r], width());
            convert_row(sums + r * width(), out + row_of(task, r), dim);
        }
    }

    static void scale_row(float* row, float by, long n) {
        for (long i = 0; i < n; i += LANES) store(row + i, load(row + i) * by);
    }

    bool is_few(long tokens) const { return tokens * per_group() <= FEW_ROWS; }

    // Calls f(offset in the chunk, rows, tokens, ahead) for each run of the chunk's tokens that lie in one block: those
    // of the next, or `then`, which is read after the last, lie `ahead` bytes from them.
    template <class F>
    void streamed_runs(const Task& task, long key, long n, const T* cache, const T* then, F f) const {
        runs(task, key, n, [&](long at, long from, long some) {
            const T *rows = cache + from, *next = at + some < n ? cache + place(task, key + at + some) : then;
            f(at, rows, some, (const char*)next - (const char*)rows);
        });
    }

    // scores[r][j] = queries[r] . keys[j] for n keys, of few rows.
    void score_in_place(const Task& task, long key, long n, const P* queries, float* scores) const {
        long rows = task.count * per_group(), dim = shape.dim;
        const T* then = values + place(task, key);
#ifdef __AMX_BF16__
        if constexpr (std::is_same_v<T, bf16>)
            if (dim == UnitScores::DIM && (shape.block_size | key) % UNIT_ROWS == 0 && has_matrix_unit()) {
                bf16* laid = scratch<bf16>(ADDED, task.groups * rows * dim);
                UnitScores unit(rows);
                for (long g = 0; g < task.groups; g++)
                    unit.lay(queries + g * rows * width(), width(), laid + g * rows * dim);
                return streamed_runs(task, key, n, keys, then, [&](long at, const T* from, long some, long ahead) {
                    for (long j = 0; j < some; j++) ask(from + j * stride(), task.groups * dim, ahead);
                    for (long j = 0; j < some; j += UNIT_ROWS)
                        for (long g = 0; g < task.groups; g++)
                            unit.score(laid + g * rows * dim, from + j * stride() + g * dim, stride(),
                                       std::min(UNIT_ROWS, some - j), scores + g * rows * CHUNK + at + j, CHUNK);
                });
            }
#endif
        streamed_runs(task, key, n, keys, then, [&](long at, const T* from, long some, long ahead) {
            for (long g = 0; g < task.groups; g++)
                score_all(queries + g * rows * width(), width(), rows, from + g * dim, stride(), some, dim, ahead,
                          scores + g * rows * CHUNK + at, CHUNK);
        });
    }

    Chunk<T, P> chunk_of(const Task& task, const T* cache, long key, long n) const {
        Chunk<T, P> chunk(scratch<P>(CHUNKED, (CHUNK + 1) * width()), width());
        runs(task, key, n, [&](long at, long from, long some) {
            for (long j = at; j < at + some; j++, from += stride()) chunk.take(j, cache + from, shape.dim, width());
        });
        return chunk;
    }

    // The scores of up to LANES queries with n keys from `key` on become `depth` weights each in the queries' running
    // softmax, whose place may be theirs, and `shrink` what the weights of earlier keys shrink by. A query sees the keys
    // up to its position.
    template <class I>
    void soften(long queries, const long* positions, long key, long n, float* scores, I* weights, long ld, long depth,
                float* most, float* mass, float* shrink) const {
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
            for (; j < to[r]; j += LANES) {  // those it does not see get the least weight there is, and then none
                Vec weight = exp(load(scores + r * CHUNK + j) * shape.scale - peak[r]);
                total[r] += weight;
                store(weights + r * ld + j, weight);
            }
            std::fill(weights + r * ld, weights + r * ld + from[r], I{});
            std::fill(weights + r * ld + to[r], weights + r * ld + std::max(j, depth), I{});
        }
        store(mass, load(mass) * by + ::sums(total));
    }

    // sums[r] = sums[r] * shrink[r] + sum over n values of weights[r][j] * values[j]. What is read next is `then`.
    void add_values_in_place(const Task& task, long key, long n, const T* then, const float* weights, float* shrink,
                             float* sums) const {
        long rows = task.count * per_group();
        streamed_runs(task, key, n, values, then, [&](long at, const T* from, long some, long ahead) {
            for (long g = 0; g < task.groups; g++)
                add_all<FEW_ROWS>(rows, weights + g * rows * CHUNK + at, CHUNK, from + g * shape.dim, stride(), some,
                                  shape.dim, ahead, shrink + g * rows, sums + g * rows * width(), width());
            std::fill(shrink, shrink + task.groups * rows, 1.0f);  // done with the first run
        });
    }

    void run(int threads) const {
        std::vector<Task> tasks;
        long step = std::max(1L, TASK_ROWS / per_group());
        long together = std::clamp(shape.sequences * shape.groups / (FEW_TASKS * threads), 1L, shape.groups);
        for (long s = 0; s < shape.sequences; s++)
            for (long g = 0; g < shape.groups; g++)  // those of one group together, whose keys a cache keeps
                for (long end = starts[s + 1] - starts[s]; end > 0; end -= step) {  // those with most keys first
                    long count = std::min(step, end), groups = is_few(count) ? together : 1;
                    if (g % groups == 0)
                        tasks.push_back({s, g, std::min(groups, shape.groups - g), std::max(0L, end - step), count});
                }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (size_t t = 0; t < tasks.size(); t++) run(tasks[t]);
    }
};
