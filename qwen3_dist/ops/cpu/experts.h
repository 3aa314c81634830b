// SwiGLU experts of a rank, each on the rows that chose it.
#pragma once

#include "linear.h"

template <class T, class W>
struct Experts {
    const T* x;                                // [R, D]
    const W *fc1, *fc2, *fc3;                  // E packed matrices each: [I, D], [I, D], [D, I]
    const float *scales1, *scales2, *scales3;  // of the outputs: [E, I], [E, I], [E, D], or E `Groups`; null: 1
    const long* ids;                           // [R, K] expert of each choice; -1: none
    const float* weights;                      // [R, K]; null: there is one expert, which all rows chose with weight 1
    T* y;                                      // [R, D]: sum over a row's choices of weight * expert(x)
    long* counts;                              // [E] the number of rows of each expert is added to it; may be null
    long rows, choices, experts, dim, inner;

    struct Task {
        long expert, pair, rows, panel, panels;
    };

    void run(int threads) const {
        run(threads, [&](long row, Input<W>* to) { convert_input(x + row * dim, to, dim, padded<W>(dim)); });
    }

    // Computes pairs of a row and one of its choices, sorted by expert. write_input(row, to) writes the inputs of a
    // row.
    template <class F>
    void run(int threads, F write_input) const {
        const Sorted by_expert = sorted();
        const auto &start = by_expert.start, &pairs = by_expert.pairs, &place = by_expert.place;
        long total = pairs.size();
        // With many rows each task gathers its own rows, so that they are in its core's cache, and does all panels.
        bool own = total >= 4 * threads * BLOCK_ROWS;
        std::vector<Task> up, down;
        for (long e = 0; e < experts; e++)
            if (long rows = start[e + 1] - start[e]) {
                add_tasks(up, e, start[e], rows, panels(inner), own ? panels(inner) : BLOCK_PANELS);
                add_tasks(down, e, start[e], rows, panels(dim), BLOCK_PANELS);
            }
        long ldx = stride<W>(dim);
        Input<W>* input = own ? nullptr : scratch<Input<W>>(INPUTS, total * ldx);
        Input<W>* hidden = scratch<Input<W>>(HIDDEN, total * stride<W>(inner));
        T* out = weights ? scratch<T>(OUTPUTS, total * dim) : nullptr;
        auto gather = [&](long pair, long count, Input<W>* to) {
            for (long p = pair; p < pair + count; p++, to += ldx) write_input(pairs[p] / choices, to);
        };
        SharedTasks ups(up.size(), threads), downs(down.size(), threads);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for
            for (long p = 0; p < (own ? 0 : total); p++) gather(p, 1, input + p * ldx);
            ups.run([&](long t) {
                Input<W>* rows = own ? scratch<Input<W>>(INPUTS, up[t].rows * ldx) : input + up[t].pair * ldx;
                if (own) gather(up[t].pair, up[t].rows, rows);
                parts(up[t], [&](const Task& task) { gate_up(task, rows, hidden); });
            });
#pragma omp barrier
            downs.run([&](long t) { parts(down[t], [&](const Task& task) { project(task, hidden, out); }); });
#pragma omp barrier
#pragma omp for
            for (long r = 0; r < (weights ? rows : 0); r++) add_up(r, place.data() + r * choices, out);
        }
    }

    // The two halves of `run`, for deterministic mode: ranks that split an expert's columns exchange what lies between.
    // A row has one choice. to [R, I]: the hidden columns of each row; rows without expert are not written.
    void hidden_columns(T* to, int threads) const {
        const Sorted by_expert = sorted();
        const auto &start = by_expert.start, &pairs = by_expert.pairs;
        long total = pairs.size(), ldx = stride<W>(dim), ldh = stride<W>(inner);
        std::vector<Task> up = tasks(start, panels(inner));
        Input<W>*input = scratch<Input<W>>(INPUTS, total * ldx), *hidden = scratch<Input<W>>(HIDDEN, total * ldh);
        SharedTasks ups(up.size(), threads);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for
            for (long p = 0; p < total; p++) convert_input(x + pairs[p] * dim, input + p * ldx, dim, padded<W>(dim));
            ups.run([&](long t) {
                parts(up[t], [&](const Task& task) { gate_up(task, input + up[t].pair * ldx, hidden); });
            });
#pragma omp barrier
#pragma omp for
            for (long p = 0; p < total; p++) convert_row(hidden + p * ldh, to + pairs[p] * inner, inner);
        }
    }

    // y [R, D] = weight * output of each row's expert for its hidden columns `from` [R, I]; 0 for rows without expert.
    void outputs(const T* from, int threads) const {
        const Sorted by_expert = sorted();
        const auto &start = by_expert.start, &pairs = by_expert.pairs, &place = by_expert.place;
        long total = pairs.size(), ldh = stride<W>(inner);
        std::vector<Task> down = tasks(start, panels(dim));
        Input<W>* hidden = scratch<Input<W>>(HIDDEN, total * ldh);
        T* out = scratch<T>(OUTPUTS, total * dim);
        SharedTasks downs(down.size(), threads);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for
            for (long p = 0; p < total; p++)
                convert_input(from + pairs[p] * inner, hidden + p * ldh, inner, padded<W>(inner));
            downs.run([&](long t) { parts(down[t], [&](const Task& task) { project(task, hidden, out); }); });
#pragma omp barrier
#pragma omp for
            for (long r = 0; r < rows; r++) add_up(r, place.data() + r, out);
        }
    }

    // The pairs of a row and one of its choices sorted by expert, where each expert's pairs start, and each pair's place
    // among the sorted ones, -1 without an expert. Adds to `counts`.
    struct Sorted {
        std::vector<long> start, pairs, place;
    };
    Sorted sorted() const {
        std::vector<long> start(experts + 1, 0), place(rows * choices, -1);
        for (long i = 0; i < rows * choices; i++)
            if (ids[i] >= 0) start[ids[i] + 1]++;
        for (long e = 0; counts && e < experts; e++) counts[e] += start[e + 1];
        for (long e = 0; e < experts; e++) start[e + 1] += start[e];
        std::vector<long> pairs(start[experts]), next(start.begin(), start.end() - 1);
        for (long i = 0; i < rows * choices; i++)
            if (ids[i] >= 0) pairs[place[i] = next[ids[i]]++] = i;
        return {start, pairs, place};
    }

    std::vector<Task> tasks(const std::vector<long>& start, long count) const {
        std::vector<Task> all;
        for (long e = 0; e < experts; e++)
            if (long rows = start[e + 1] - start[e]) add_tasks(all, e, start[e], rows, count, BLOCK_PANELS);
        return all;
    }

    // Tasks of the same rows follow each other, so that the rows stay in a cache.
    static void add_tasks(std::vector<Task>& tasks, long expert, long first, long rows, long count, long step) {
        for (long row = 0; row < rows; row += BLOCK_ROWS)
            for (long panel = 0; panel < count; panel += step)
                tasks.push_back({expert, first + row, std::min(BLOCK_ROWS, rows - row), panel,
                                 std::min(step, count - panel)});
    }

    // Splits a task into parts of `panels_at_once` panels and calls f with each.
    template <class F>
    static void parts(Task task, F f) {
        for (long end = task.panel + task.panels; task.panel < end; task.panel += task.panels) {
            task.panels = std::min(panels_at_once(task.rows), end - task.panel);
            f(task);
        }
    }

    // The product of a task's rows, which begin at `from`, with its panels of an expert's matrix of `outputs` outputs.
    // A row of `sums` has `task.panels` panels. Calls done(row of sums, row of the task, first column, columns) when
    // columns of a row are complete.
    template <class F>
    void product(const Task& task, const Input<W>* from, const W* w, const float* scales, long outputs, long depth,
                 float* sums, F done) const {
        long first = task.expert * panels(outputs) + task.panel, ldx = stride<W>(depth), ldo = task.panels * PANEL;
        auto finish = [&](long p, long count, long m, long rows) {
            long at = (task.panel + p) * PANEL, cols = std::min(count * PANEL, outputs - at);
            for (long i = m; i < m + rows; i++) {
                float* row = sums + i * ldo + p * PANEL;
                for (long j = 0; !HAS_GROUPS<W> && scales && j < cols; j++)
                    row[j] *= scales[task.expert * outputs + at + j];
                done(row, i, p * PANEL, count * PANEL);
            }
        };
        if constexpr (HAS_GROUPS<W>)
            grouped_product(from, ldx, task.rows, after(w, first * PANEL * depth),
                            Groups(scales).of_matrix(task.expert, panels(outputs)), task.panel, task.panels, depth, sums, ldo,
                            finish);
        else
            block_product<W>(from, ldx, task.rows, w + first * PANEL * depth, task.panels, depth, sums, ldo, finish);
    }

    void gate_up(const Task& task, const Input<W>* input, Input<W>* hidden) const {
        alignas(LINE) float gates[BLOCK_SUMS], values[BLOCK_SUMS];
        long depth = padded<W>(inner), ldx = stride<W>(inner);
        product(task, input, fc1, scales1, inner, padded<W>(dim), gates, [](float*, long, long, long) {});
        auto store_hidden = [&](float* value, long i, long first, long cols) {
            float* gate = gates + i * task.panels * PANEL + first;
            long at = task.panel * PANEL + first, some = std::min(cols, depth - at), j = 0;
            Input<W>* to = hidden + (task.pair + i) * ldx + at;
            auto product = [&] { return silu<T>(rounded<T>(load(gate + j))) * rounded<T>(load(value + j)); };
            for (; j + LANES <= some; j += LANES) store_rounded<T>(to + j, product());
            if (j < some) {
                store_rounded<T>(value + j, product());
                convert_row(value + j, to + j, some - j);
            }
        };
        product(task, input, fc2, scales2, inner, padded<W>(dim), values, store_hidden);
    }

    void project(const Task& task, const Input<W>* hidden, T* out) const {
        alignas(LINE) float sums[BLOCK_SUMS];
        auto store_outputs = [&](float* sum, long i, long first, long cols) {
            long at = task.panel * PANEL + first, place = (task.pair + i) * dim + at, some = std::min(cols, dim - at);
            convert_row(sum, (weights ? out : y) + place, some);
        };
        product(task, hidden + task.pair * stride<W>(inner), fc3, scales3, dim, padded<W>(inner), sums, store_outputs);
    }

    void add_up(long row, const long* place, const T* out) const {
        float* sum = scratch(ROW, dim);
        std::fill(sum, sum + dim, 0.0f);
        for (long c = 0; c < choices; c++)
            if (place[c] >= 0) {
                const T* from = out + place[c] * dim;
                float weight = weights[row * choices + c];
                long i = 0;
                for (; i + LANES <= dim; i += LANES) store(sum + i, load(sum + i) + weight * load(from + i));
                for (; i < dim; i++) sum[i] += weight * widen(from[i]);
            }
        convert_row(sum, y + row * dim, dim);
    }
};
