// SwiGLU experts on the rows that chose them.
#pragma once

#include "linear.h"

template <class T, class W>
struct Experts {
    const T* x;                             // [R, D]
    const W *fc1, *fc2, *fc3;               // [E, I, D], the same, [E, D, I]
    const float *scales1, *scales2, *scales3;  // of their outputs: [E, I], the same, [E, D]; null: 1
    const long* ids;               // [R, K] expert of each choice, -1 for none
    const float* weights;          // [R, K]
    T* y;                          // [R, D]: sum over a row's choices of weight * expert(x)
    long rows, choices, experts, dim, inner;

    struct Task {
        long expert, pair, rows, column, columns;
    };

    // Pairs of a row and one of its choices, sorted by expert. Experts nobody chose cost nothing.
    void run(int threads) const {
        std::vector<long> start(experts + 1, 0), pairs, place(rows * choices, -1);
        for (long i = 0; i < rows * choices; i++)
            if (ids[i] >= 0) start[ids[i] + 1]++;
        for (long e = 0; e < experts; e++) start[e + 1] += start[e];
        long total = start[experts];
        pairs.resize(total);
        std::vector<long> next(start.begin(), start.end() - 1);
        for (long i = 0; i < rows * choices; i++)
            if (ids[i] >= 0) pairs[place[i] = next[ids[i]]++] = i;
        std::vector<Task> up, down;
        for (long e = 0; e < experts; e++)
            for (long pair = start[e]; pair < start[e + 1]; pair += BLOCK_ROWS) {
                long count = std::min(BLOCK_ROWS, start[e + 1] - pair);
                long width = block_cols(count);
                for (long n = 0; n < inner; n += width) up.push_back({e, pair, count, n, std::min(width, inner - n)});
                for (long n = 0; n < dim; n += width) down.push_back({e, pair, count, n, std::min(width, dim - n)});
            }
        std::vector<float> input(total * dim), hidden(total * inner), out(total * dim);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for
            for (long p = 0; p < total; p++) widen_row(x + pairs[p] / choices * dim, input.data() + p * dim, dim);
#pragma omp for schedule(dynamic, 2)
            for (size_t t = 0; t < up.size(); t++) gate_up(up[t], input.data(), hidden.data());
#pragma omp for schedule(dynamic, 2)
            for (size_t t = 0; t < down.size(); t++) project(down[t], hidden.data(), out.data());
#pragma omp for
            for (long r = 0; r < rows; r++) add_up(r, place.data() + r * choices, out.data());
        }
    }

    void gate_up(const Task& task, const float* input, float* hidden) const {
        float gate[BLOCK_ROWS * BLOCK_COLS], value[BLOCK_ROWS * BLOCK_COLS];
        auto [e, pair, count, n, cols] = task;
        long at = (e * inner + n) * dim;
        block_product(input + pair * dim, dim, count, fc1 + at, cols, dim, gate);
        block_product(input + pair * dim, dim, count, fc2 + at, cols, dim, value);
        if (scales1) {
            scale(gate, count, cols, scales1 + e * inner + n);
            scale(value, count, cols, scales2 + e * inner + n);
        }
        for (long i = 0; i < count; i++)
            for (long j = 0; j < cols; j++) {
                float g = rounded<T>(gate[i * BLOCK_COLS + j]), u = rounded<T>(value[i * BLOCK_COLS + j]);
                hidden[(pair + i) * inner + n + j] = rounded<T>(rounded<T>(g / (1 + std::exp(-g))) * u);
            }
    }

    void project(const Task& task, const float* hidden, float* out) const {
        float tile[BLOCK_ROWS * BLOCK_COLS];
        auto [e, pair, count, n, cols] = task;
        block_product(hidden + pair * inner, inner, count, fc3 + (e * dim + n) * inner, cols, inner, tile);
        if (scales3) scale(tile, count, cols, scales3 + e * dim + n);
        for (long i = 0; i < count; i++)
            for (long j = 0; j < cols; j++) out[(pair + i) * dim + n + j] = rounded<T>(tile[i * BLOCK_COLS + j]);
    }

    static void scale(float* tile, long rows, long cols, const float* by) {
        for (long i = 0; i < rows; i++)
            for (long j = 0; j < cols; j++) tile[i * BLOCK_COLS + j] *= by[j];
    }

    void add_up(long row, const long* place, const float* out) const {
        float* sum = scratch(1, dim);
        std::fill(sum, sum + dim, 0.0f);
        for (long c = 0; c < choices; c++)
            if (place[c] >= 0)
                for (long i = 0; i < dim; i++) sum[i] += weights[row * choices + c] * out[place[c] * dim + i];
        for (long i = 0; i < dim; i++) narrow(sum[i], y[row * dim + i]);
    }
};
