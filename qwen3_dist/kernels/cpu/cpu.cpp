// The C interface of the CPU kernels, each for bf16 and fp32. `native.py` declares the same signatures.
#include "attention.h"
#include "experts.h"
#include "rows.h"

// clang-format off
#define KERNELS(T, NAME) \
extern "C" { \
void linear_##NAME(const T* x, const T* w, const T* bias, T* y, long m, long n, long k, long threads) { \
    linear<T>(x, w, bias, y, m, n, k, int(threads)); \
} \
void experts_##NAME(const T* x, const T* fc1, const T* fc2, const T* fc3, const long* ids, const float* weights, T* y, \
                    long rows, long choices, long experts, long dim, long inner, long threads) { \
    Experts<T>{x, fc1, fc2, fc3, ids, weights, y, rows, choices, experts, dim, inner}.run(int(threads)); \
} \
void attention_##NAME(const T* q, const T* keys, const T* values, T* out, const long* tables, const long* context_lens, \
                      const long* starts, long sequences, long heads, long groups, long dim, long block_size, \
                      long width, long window, double scale, long threads) { \
    AttentionShape shape{sequences, heads, groups, dim, block_size, width, window, float(scale)}; \
    Attention<T>{q, keys, values, out, tables, context_lens, starts, shape}.run(int(threads)); \
} \
void norm_##NAME(const T* x, const T* scale, T* out, long rows, long dim, double eps, long threads) { \
    norm<T>(x, scale, out, rows, dim, float(eps), int(threads)); \
} \
void rotate_##NAME(T* q, const T* k, const T* v, T* keys, T* values, const T* q_scale, const T* k_scale, const T* cos, \
                   const T* sin, const long* slots, long tokens, long heads, long groups, long dim, double eps, \
                   long threads) { \
    Rotation<T>{q, keys, values, k, v, q_scale, k_scale, cos, sin, slots, tokens, heads, groups, dim, float(eps)} \
        .run(int(threads)); \
} \
void silu_product_##NAME(const T* gate, const T* up, T* out, long count, long threads) { \
    silu_product<T>(gate, up, out, count, int(threads)); \
} \
}

KERNELS(bf16, bf16)
KERNELS(float, fp32)
