// Attention over KV blocks where they lie, with a running softmax (arXiv 2205.14135): a task is the
// queries of one KV group for a few tokens of one sequence.
#pragma once

#include "linear.h"

struct AttentionShape {
    long sequences, heads, groups, dim, block_size, table_width, window;  // window 0: none
    float scale;
};

constexpr long TASK_ROWS = 16;  // query rows (tokens times heads of a group) in a task

template <class T>
struct Attention {
    const T *q, *keys, *values;  // q [T, H, d]; keys, values [blocks, block_size, G, d]
    T* out;                      // [T, H, d]
    const long *tables, *context_lens, *starts;  // [S, table_width], [S], [S + 1] first row of each sequence
    AttentionShape shape;

    // Tokens [first, first + count) of sequence s, for the heads of group g.
    void tile(long s, long g, long first, long count) const {
        const auto& [_, heads, groups, dim, block_size, width, window, scale] = shape;
        long per_group = heads / groups, rows = count * per_group;
        long before = context_lens[s] - (starts[s + 1] - starts[s]);  // tokens of s ahead of this step
        long last = before + first + count - 1;
        long begin = window ? std::max(0L, before + first - window + 1) : 0;
        float* queries = scratch(0, rows * dim);
        float* sums = scratch(1, rows * dim);
        float* wide = scratch(2, block_size * dim);
        float* scores = scratch(3, rows * (block_size + 2));
        float *most = scores + rows * block_size, *mass = most + rows;
        for (long r = 0; r < rows; r++) {
            const T* from = q + ((starts[s] + first + r / per_group) * heads + g * per_group + r % per_group) * dim;
            for (long i = 0; i < dim; i++) queries[r * dim + i] = widen(from[i]) * scale;
            most[r] = -INFINITY, mass[r] = 0;
        }
        std::fill(sums, sums + rows * dim, 0.0f);
        for (long b = begin / block_size; b <= last / block_size; b++) {
            long key = b * block_size, n = std::min(block_size, last + 1 - key);
            long at = (tables[s * width + b] * block_size * groups + g) * dim;
            for (long j = 0; j < n; j++) widen_row(keys + at + j * groups * dim, wide + j * dim, dim);
            dots_all(queries, dim, rows, wide, dim, n, dim, scores, block_size);
            for (long j = 0; j < n; j++) widen_row(values + at + j * groups * dim, wide + j * dim, dim);
            for (long r = 0; r < rows; r++) {
                long position = before + first + r / per_group;
                long from = window ? std::clamp(position - window + 1 - key, 0L, n) : 0;
                long to = std::clamp(position + 1 - key, 0L, n);
                if (from < to) add_block(scores + r * block_size, from, to, most[r], mass[r], wide, sums + r * dim);
            }
        }
        for (long r = 0; r < rows; r++) {
            T* to = out + ((starts[s] + first + r / per_group) * heads + g * per_group + r % per_group) * dim;
            for (long i = 0; i < dim; i++) narrow(sums[r * dim + i] / mass[r], to[i]);
        }
    }

    // Takes keys [from, to) of a block into one query's running softmax.
    void add_block(float* score, long from, long to, float& most, float& mass, const float* value, float* sum) const {
        float highest = most;
        for (long j = from; j < to; j++) highest = std::max(highest, score[j]);
        float shrink = std::exp(most - highest);
        most = highest;
        mass *= shrink;
        for (long j = from; j < to; j++) mass += score[j] = std::exp(score[j] - highest);
        long i = 0;
        for (; i + 2 * LANES <= shape.dim; i += 2 * LANES) {
            Vec low = load(sum + i) * shrink, high = load(sum + i + LANES) * shrink;
            for (long j = from; j < to; j++) {
                low += load(value + j * shape.dim + i) * score[j];
                high += load(value + j * shape.dim + i + LANES) * score[j];
            }
            store(sum + i, low), store(sum + i + LANES, high);
        }
        for (; i < shape.dim; i++) {
            sum[i] *= shrink;
            for (long j = from; j < to; j++) sum[i] += value[j * shape.dim + i] * score[j];
        }
    }

    void run(int threads) const {
        struct Task {
            long s, g, first, count;
        };
        std::vector<Task> tasks;
        long step = std::max(1L, TASK_ROWS / (shape.heads / shape.groups));
        for (long s = 0; s < shape.sequences; s++)
            for (long first = 0; first < starts[s + 1] - starts[s]; first += step)
                for (long g = 0; g < shape.groups; g++)
                    tasks.push_back({s, g, first, std::min(step, starts[s + 1] - starts[s] - first)});
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (size_t t = 0; t < tasks.size(); t++) tile(tasks[t].s, tasks[t].g, tasks[t].first, tasks[t].count);
    }
};
