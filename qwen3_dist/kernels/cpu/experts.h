// SwiGLU experts on the rows that chose them.
#pragma once

#include "linear.h"

template <class T, class W>
struct Experts {
    const T* x;                                // [R, D]
    const W *fc1, *fc2, *fc3;                  // E packed matrices each, [I, D], the same, [D, I]
    const float *scales1, *scales2, *scales3;  // of their outputs: [E, I], the same, [E, D]; null: 1
    const long* ids;                           // [R, K] expert of each choice, -1 for none
    const float* weights;                      // [R, K]
    T* y;                                      // [R, D]: sum over a row's choices of weight * expert(x)
    long* counts;                              // [E] to which the choices of each expert are added, or null
    long rows, choices, experts, dim, inner;

    struct Task {
        long expert, pair, rows, panel, panels;
    };

    // Pairs of a row and one of its choices, sorted by expert. Experts nobody chose cost nothing.
    void run(int threads) const {
        std::vector<long> start(experts + 1, 0), pairs, place(rows * choices, -1);
        for (long i = 0; i < rows * choices; i++)
            if (ids[i] >= 0) start[ids[i] + 1]++;
        for (long e = 0; counts && e < experts; e++) counts[e] += start[e + 1];
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
                add_tasks(up, {e, pair, count, 0, 0}, panels(inner));
                add_tasks(down, {e, pair, count, 0, 0}, panels(dim));
            }
        long dim_depth = padded<W>(dim), inner_depth = padded<W>(inner);
        std::vector<Input<W>> input(total * dim_depth), hidden(total * inner_depth);
        std::vector<float> out(total * dim);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for
            for (long p = 0; p < total; p++)
                put_row(x + pairs[p] / choices * dim, input.data() + p * dim_depth, dim, dim_depth);
#pragma omp for schedule(dynamic)
            for (size_t t = 0; t < up.size(); t++) gate_up(up[t], input.data(), hidden.data());
#pragma omp for schedule(dynamic)
            for (size_t t = 0; t < down.size(); t++) project(down[t], hidden.data(), out.data());
#pragma omp for
            for (long r = 0; r < rows; r++) add_up(r, place.data() + r * choices, out.data());
        }
    }

    static void add_tasks(std::vector<Task>& tasks, Task task, long count) {
        for (task.panel = 0; task.panel < count; task.panel += BLOCK_PANELS) {
            task.panels = std::min(BLOCK_PANELS, count - task.panel);
            tasks.push_back(task);
        }
    }

    // The task's part of a product of its expert, whose matrix has so many outputs.
    void product(const Task& task, const Input<W>* from, const W* w, const float* scales, long outputs, long depth,
                 float* out) const {
        long first = task.expert * panels(outputs) + task.panel;
        block_product<W>(from + task.pair * depth, depth, task.rows, w + first * PANEL * depth, task.panels, depth, out);
        long at = task.panel * PANEL, cols = std::min(task.panels * PANEL, outputs - at);
        if (scales) scale(out, task.rows, cols, scales + task.expert * outputs + at);
    }

    void gate_up(const Task& task, const Input<W>* input, Input<W>* hidden) const {
        float gate[BLOCK_ROWS * BLOCK_COLS], value[BLOCK_ROWS * BLOCK_COLS];
        product(task, input, fc1, scales1, inner, padded<W>(dim), gate);
        product(task, input, fc2, scales2, inner, padded<W>(dim), value);
        long at = task.panel * PANEL, cols = std::min(task.panels * PANEL, inner - at), depth = padded<W>(inner);
        for (long i = 0; i < task.rows; i++)
            for (long j = 0; j < cols; j++) {
                float g = rounded<T>(gate[i * BLOCK_COLS + j]), u = rounded<T>(value[i * BLOCK_COLS + j]);
                narrow(rounded<T>(rounded<T>(g / (1 + std::exp(-g))) * u), hidden[(task.pair + i) * depth + at + j]);
            }
    }

    void project(const Task& task, const Input<W>* hidden, float* out) const {
        float tile[BLOCK_ROWS * BLOCK_COLS];
        product(task, hidden, fc3, scales3, dim, padded<W>(inner), tile);
        long at = task.panel * PANEL, cols = std::min(task.panels * PANEL, dim - at);
        for (long i = 0; i < task.rows; i++)
            for (long j = 0; j < cols; j++) out[(task.pair + i) * dim + at + j] = rounded<T>(tile[i * BLOCK_COLS + j]);
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
