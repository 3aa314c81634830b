// Operations on single tokens: norms, RoPE, maxima. They round to T in the same places as the plain torch operations.
#pragma once

#include "cache.h"
#include "linear.h"

// out = norm(x) * scale over the last dimension; fp32 inside, cast to T before the scale multiplies.
template <class T>
inline void norm_row(const T* x, const T* scale, float* out, long dim, float eps) {
    Vec squares = {};
    float total = 0;
    long i = 0;
    for (; i + LANES <= dim; i += LANES) squares += load(x + i) * load(x + i);
    for (; i < dim; i++) total += widen(x[i]) * widen(x[i]);
    float factor = 1 / std::sqrt((total + sum(squares)) / dim + eps);
    for (i = 0; i + LANES <= dim; i += LANES)
        store(out + i, rounded<T>(rounded<T>(load(x + i) * factor) * load(scale + i)));
    for (; i < dim; i++) out[i] = rounded<T>(rounded<T>(widen(x[i]) * factor) * widen(scale[i]));
}

template <class T>
void norm(const T* x, const T* scale, T* out, long rows, long dim, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (long r = 0; r < rows; r++) {
        float* wide = scratch(ROW, dim);
        norm_row(x + r * dim, scale, wide, dim, eps);
        convert_row(wide, out + r * dim, dim);
    }
}

// x += y, rounded to T.
template <class T>
inline void add_row(T* x, const T* y, long dim) {
    long i = 0;
    for (; i + LANES <= dim; i += LANES) store(x + i, load(x + i) + load(y + i));
    for (; i < dim; i++) narrow(widen(x[i]) + widen(y[i]), x[i]);
}

// out = silu(gate) * up [rows, columns]; rows of gate and up are `stride` apart. The last numbers are a whole vector too:
// a number's place in a row changes no bit of it.
template <class T>
void swiglu(const T* gate, const T* up, T* out, long rows, long columns, long gate_stride, long up_stride, int threads) {
    auto vector = [](const T* g, const T* u, T* to) { store(to, silu<T>(load(g)) * load(u)); };
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (long r = 0; r < rows; r++) {
        const T *g = gate + r * gate_stride, *u = up + r * up_stride;
        T *to = out + r * columns, last[3][LANES] = {};
        long i = 0, rest = columns % LANES * sizeof(T);
        for (; i + LANES <= columns; i += LANES) vector(g + i, u + i, to + i);
        memcpy(last[0], g + i, rest);
        memcpy(last[1], u + i, rest);
        vector(last[0], last[1], last[2]);
        memcpy(to + i, last[2], rest);
    }
}

template <class T>
inline float largest(const T* x, long count) {
    Vec most = Vec{} - INFINITY;
    long i = 0;
    for (; i + LANES <= count; i += LANES) most = larger(most, load(x + i));
    float highest = largest(most);
    for (; i < count; i++) highest = std::max(highest, widen(x[i]));
    return highest;
}

// out [rows, ceil(columns / width)]: the maximum of each run of `width` numbers of a row of x.
template <class T>
void block_max(const T* x, float* out, long rows, long columns, long width, int threads) {
    long blocks = (columns + width - 1) / width;
#pragma omp parallel for num_threads(threads)
    for (long b = 0; b < rows * blocks; b++) {
        long begin = b % blocks * width;
        out[b] = largest(x + b / blocks * columns + begin, std::min(width, columns - begin));
    }
}

// out [rows]: the argmax of each row of x, the first of equal ones. Rows are `stride` apart.
template <class T>
void argmax(const T* x, long* out, long rows, long columns, long stride, int threads) {
    constexpr long PART = 4096;
    long parts = (columns + PART - 1) / PART;
    std::vector<float> most(rows * parts);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long p = 0; p < rows * parts; p++) {
            long begin = p % parts * PART;
            most[p] = largest(x + p / parts * stride + begin, std::min(PART, columns - begin));
        }
#pragma omp for
        for (long row = 0; row < rows; row++) {
            const float* each = &most[row * parts];
            long part = std::max_element(each, each + parts) - each, at = part * PART;
            while (at + 1 < columns && widen(x[row * stride + at]) != each[part]) at++;
            out[row] = at;
        }
    }
}

// The norm of a row, in the input type of products.
template <class T, class I>
inline void norm_input(const T* x, const T* scale, I* to, long dim, long depth, float eps) {
    float* wide = scratch(ROW, dim);
    norm_row(x, scale, wide, dim, eps);
    convert_input(wide, to, dim, depth);
}

// Norm per head (unless the scale is null) and RoPE by cos and sin [T, d] of q and k. q is changed in place, k and v
// are written to their slots of the KV cache.
template <class T>
struct Rotation {
    T* q;
    const Cache& cache;
    const T *k, *v, *q_scale, *k_scale, *cos, *sin;
    const long* slots;
    long tokens, heads, groups, dim;
    float eps;

    void head(const T* from, const T* scale, long token, T* to) const {
        float* x = scratch(ROW, dim);
        if (scale)
            norm_row(from, scale, x, dim, eps);
        else
            convert_row(from, x, dim);
        const T *c = cos + token * dim, *s = sin + token * dim;
        long half = dim / 2, i = 0;
        for (; i + LANES <= half; i += LANES) {
            Vec low = load(x + i), high = load(x + i + half);
            store(to + i, rounded<T>(low * load(c + i)) - rounded<T>(high * load(s + i)));
            store(to + i + half, rounded<T>(high * load(c + i + half)) + rounded<T>(low * load(s + i + half)));
        }
        for (; i < half; i++) {
            narrow(rounded<T>(x[i] * widen(c[i])) - rounded<T>(x[i + half] * widen(s[i])), to[i]);
            narrow(rounded<T>(x[i + half] * widen(c[i + half])) + rounded<T>(x[i] * widen(s[i + half])), to[i + half]);
        }
    }

    void run(int threads) const {
#pragma omp parallel for num_threads(threads) if (tokens > 1)
        for (long t = 0; t < tokens; t++) {
            for (long h = 0; h < heads; h++) {
                T* at = q + (t * heads + h) * dim;
                head(at, q_scale, t, at);
            }
            with_numbers_of<T>(cache, [&](auto* numbers) { keep<std::remove_pointer_t<decltype(numbers)>>(t); });
        }
    }

    // Writes the keys and values of token t to its slot.
    template <class C>
    void keep(long t) const {
        long size = groups * dim;
        C *keys = (C*)cache.keys + slots[t] * size, *values = (C*)cache.values + slots[t] * size;
        if constexpr (std::is_same_v<C, T>) {
            for (long g = 0; g < groups; g++) head(k + t * size + g * dim, k_scale, t, keys + g * dim);
            memcpy(values, v + t * size, size * sizeof(T));
        } else {
            T* rotated = scratch<T>(ROTATED, size);
            for (long g = 0; g < groups; g++) head(k + t * size + g * dim, k_scale, t, rotated + g * dim);
            encode_row(rotated, cache.key_scale, keys, size);
            encode_row(v + t * size, cache.value_scale, values, size);
        }
    }
};
