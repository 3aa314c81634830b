// Linear layers: products with packed weights, in parallel.
#pragma once

#include "groups.h"

// The number of panels whose outputs are computed before they are used further, so that they fit the L1 cache.
inline long panels_at_once(long rows) { return rows * BLOCK_COLS <= BLOCK_SUMS ? BLOCK_PANELS : 1; }

// Converts a row to the input type of products and pads it with zeros.
template <class T, class I>
inline void convert_input(const T* x, I* out, long inner, long depth) {
    convert_row(x, out, inner);
    std::fill(out + inner, out + depth, I{});
}

// y [M, n] = x [M, K] @ w [n, K]^T * scales [n] + bias [n]; scales and bias may be null. Codes have scales as `Groups`.
template <class T, class W>
struct Product {
    const W* w;
    const float* scales;
    const T* bias;
    long n;
    T* y;

    // The outputs of `count` panels from panel p on for rows [m, m + rows) of x.
    void block(const Input<W>* x, long m, long rows, long depth, long p, long count) const {
        alignas(LINE) float out[BLOCK_SUMS];
        long ldx = stride<W>(depth), step = panels_at_once(rows), ldo = step * PANEL;
        for (long end = p + count; p < end; p += step) {
            long some = std::min(step, end - p);
            auto done = [&](long q, long panels, long first, long rows) {
                for (long i = first; i < first + rows; i++)
                    finish(out + i * ldo + q * PANEL, m + i, (p + q) * PANEL, panels * PANEL);
            };
            if constexpr (HAS_GROUPS<W>)
                grouped_product(x + m * ldx, ldx, rows, after(w, p * PANEL * depth), Groups(scales), p, some, depth, out, ldo,
                                done);
            else
                block_product<W>(x + m * ldx, ldx, rows, w + p * PANEL * depth, some, depth, out, ldo, done);
        }
    }

    // Scales, biases and stores a row of sums as the outputs from `at` on.
    void finish(float* row, long m, long at, long cols) const {
        cols = std::min(cols, n - at);
        for (long j = 0; !HAS_GROUPS<W> && scales && j < cols; j++) row[j] *= scales[at + j];
        for (long j = 0; bias && j < cols; j++) row[j] = rounded<T>(row[j]) + widen(bias[at + j]);
        convert_row(row, y + m * n + at, cols);
    }
};

// Up to three products with the same inputs. write_input(m, to) writes the inputs of row m as `convert_input` does.
template <class T, class W, class F>
void linear_of(F write_input, const std::vector<Product<T, W>>& products, long m_end, long inner, int threads) {
    long depth = padded<W>(inner), ldx = stride<W>(inner);
    Input<W>* input = scratch<Input<W>>(INPUTS, m_end * ldx);
    struct Task {
        const Product<T, W>* product;
        long m, rows, panel, count;
    };
    std::vector<Task> tasks;
    // tasks of the same rows follow each other, so that the rows stay in a cache
    for (long m = 0; m < m_end; m += BLOCK_ROWS)
        for (const auto& product : products)
            for (long p = 0; p < panels(product.n); p += BLOCK_PANELS)
                tasks.push_back({&product, m, std::min(BLOCK_ROWS, m_end - m), p,
                                 std::min(BLOCK_PANELS, panels(product.n) - p)});
    SharedTasks shared(tasks.size(), threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long m = 0; m < m_end; m++) write_input(m, input + m * ldx);
        shared.run([&](long t) {
            auto [product, m, rows, panel, count] = tasks[t];
            product->block(input, m, rows, depth, panel, count);
        });
    }
}

template <class T, class W>
void linear(const T* x, const std::vector<Product<T, W>>& products, long m_end, long inner, int threads) {
    auto write_input = [&](long m, Input<W>* to) { convert_input(x + m * inner, to, inner, padded<W>(inner)); };
    linear_of<T, W>(write_input, products, m_end, inner, threads);
}
