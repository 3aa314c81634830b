// The C interface of the CPU kernels, for bf16 and fp32; products also for narrow weights. `kernels.py` has the same
// signatures.
#include "block_kernels.h"

// clang-format off
#define PACKING(W, NAME) \
extern "C" { \
void pack_##NAME(const W* w, W* out, long outputs, long inner, long threads) { \
    pack(w, out, outputs, inner, int(threads)); \
} \
long padded_##NAME(long inner) { return padded<W>(inner); } \
}

#define PRODUCTS(T, W, NAME) \
extern "C" { \
void linear_##NAME(const T* x, const W* w1, const W* w2, const W* w3, const float* scales1, const float* scales2, \
                   const float* scales3, const T* bias1, const T* bias2, const T* bias3, T* y, long m, long k, long n1, \
                   long n2, long n3, long threads) { \
    linear<T, W>(x, {{w1, scales1, bias1, n1, y}, {w2, scales2, bias2, n2, y + m * n1}, \
                     {w3, scales3, bias3, n3, y + m * (n1 + n2)}}, m, k, int(threads)); \
} \
void attention_kernel_##NAME(const AttentionKernel<T, W>* kernel, const T* x, T* out, const Cache* cache, const T* cos, \
                             const T* sin, const AttentionMetadata* metadata, long threads) { \
    kernel->run(x, out, *cache, cos, sin, *metadata, int(threads)); \
} \
long blocks_##NAME(const Block<T, W>* blocks, long count, T* x, const Cache* caches, const T* cos, const T* sin, \
                   const AttentionMetadata* metadata, const Logits<T, HeadWeight<T, W>>* logits, const Group* group, \
                   long operation, long threads) { \
    return run_blocks(blocks, count, x, caches, cos, sin, *metadata, logits, group, operation, int(threads)); \
} \
void feed_forward_kernel_##NAME(const FeedForwardKernel<T, W>* kernel, const T* x, T* out, long rows, long threads) { \
    kernel->run(x, out, rows, int(threads)); \
} \
void experts_kernel_##NAME(const ExpertsKernel<T, W>* kernel, const T* x, T* out, long rows, long threads) { \
    kernel->run(x, out, rows, int(threads)); \
} \
void experts_##NAME(const T* x, const W* fc1, const W* fc2, const W* fc3, const float* scales1, const float* scales2, \
                    const float* scales3, const long* ids, const float* weights, T* y, long* counts, long rows, \
                    long choices, long experts, long dim, long inner, long threads) { \
    Experts<T, W>{x, fc1, fc2, fc3, scales1, scales2, scales3, ids, weights, y, counts, rows, choices, experts, dim, \
                  inner} \
        .run(int(threads)); \
} \
void expert_hidden_##NAME(const T* x, const W* fc1, const W* fc2, const float* scales1, const float* scales2, \
                          const long* ids, T* to, long* counts, long rows, long experts, long dim, long inner, \
                          long threads) { \
    Experts<T, W>{x, fc1, fc2, nullptr, scales1, scales2, nullptr, ids, nullptr, nullptr, counts, rows, 1, experts, dim, \
                  inner} \
        .hidden_columns(to, int(threads)); \
} \
void expert_outputs_##NAME(const T* hidden, const W* fc3, const float* scales3, const long* ids, const float* weights, \
                           T* y, long rows, long experts, long dim, long inner, long threads) { \
    Experts<T, W>{nullptr, nullptr, nullptr, fc3, nullptr, nullptr, scales3, ids, weights, y, nullptr, rows, 1, experts, \
                  dim, inner} \
        .outputs(hidden, int(threads)); \
} \
}

#define KERNELS(T, NAME) \
extern "C" { \
void swiglu_##NAME(const T* gate, const T* up, T* out, long rows, long columns, long gate_stride, long up_stride, \
                   long threads) { \
    swiglu<T>(gate, up, out, rows, columns, gate_stride, up_stride, int(threads)); \
} \
void route_##NAME(const T* logits, long* ids, float* weights, long rows, long experts, long choices, long normed, \
                  long threads) { \
    route<T>(logits, rows, experts, choices, normed, ids, weights); \
} \
void packed_rows_##NAME(const T* packed, const long* ids, T* out, long count, long inner, long threads) { \
    packed_rows<T>(packed, ids, out, count, inner, int(threads)); \
} \
void attention_##NAME(const T* q, const Cache* cache, T* out, const int* tables, const long* table_rows, \
                      const long* context_lens, const long* starts, long sequences, long heads, long groups, long dim, long block_size, \
                      long width, long window, double scale, long threads) { \
    AttentionShape shape{sequences, heads, groups, dim, block_size, width, window, float(scale)}; \
    attend(q, *cache, out, tables, table_rows, context_lens, starts, shape, int(threads)); \
} \
void norm_##NAME(const T* x, const T* scale, T* out, long rows, long dim, double eps, long threads) { \
    norm<T>(x, scale, out, rows, dim, float(eps), int(threads)); \
} \
void rotate_##NAME(T* q, const T* k, const T* v, const Cache* cache, const T* q_scale, const T* k_scale, const T* cos, \
                   const T* sin, const long* slots, long tokens, long heads, long groups, long dim, double eps, \
                   long threads) { \
    Rotation<T>{q, *cache, k, v, q_scale, k_scale, cos, sin, slots, tokens, heads, groups, dim, float(eps)} \
        .run(int(threads)); \
} \
void block_max_##NAME(const T* x, float* out, long rows, long columns, long width, long threads) { \
    block_max<T>(x, out, rows, columns, width, int(threads)); \
} \
void argmax_##NAME(const T* x, long* out, long rows, long columns, long stride, long threads) { \
    argmax<T>(x, out, rows, columns, stride, int(threads)); \
} \
}

#define SUMS(T, NAME) \
extern "C" { \
long all_reduce_##NAME(const Group* group, long operation, const T* x, const T* addend, T* out, long n) { \
    return group->all_reduce(operation, x, addend, out, n); \
} \
long reduce_scatter_##NAME(const Group* group, long operation, const T* x, T* out, long n) { \
    return group->reduce_scatter(operation, x, out, n); \
} \
}

extern "C" {
long now_in_ticks() { return ticks(); }
long exchange(const Group* group, long operation) { return group->exchange(operation + 1) ? operation + 1 : -1; }
long gather(const Group* group, long operation, const char* x, char* out, long bytes, long row, long gives) {
    return group->gather(operation, x, out, bytes, row, gives);
}
long broadcast(const Group* group, long operation, char* x, long bytes) {
    return group->broadcast(operation, x, bytes);
}
}
SUMS(bf16, bf16)
SUMS(float, fp32)
#ifdef __F16C__
SUMS(fp16, fp16)
#endif
extern "C" long panel_outputs() { return PANEL; }
#define SIZE_OF(NAME, ...) \
extern "C" long size_of_##NAME() { return sizeof(__VA_ARGS__); }
SIZE_OF(Group, Group)
SIZE_OF(Cache, Cache)
SIZE_OF(AttentionMetadata, AttentionMetadata)
SIZE_OF(AttentionKernel, AttentionKernel<float, float>)
SIZE_OF(FeedForwardKernel, FeedForwardKernel<float, float>)
SIZE_OF(ExpertsKernel, ExpertsKernel<float, float>)
SIZE_OF(Head, Head<float, float>)
SIZE_OF(Logits, Logits<float, float>)
SIZE_OF(Block, Block<float, float>)
PACKING(bf16, bf16)
PACKING(float, fp32)
PACKING(Int8<bf16>, bf16_int8)
PACKING(Int8<float>, fp32_int8)
PACKING(Fp8<bf16>, bf16_fp8)
PACKING(Fp8<float>, fp32_fp8)
PACKING(Nibbles<bf16>, bf16_4bit)
PACKING(Nibbles<float>, fp32_4bit)
PRODUCTS(bf16, bf16, bf16)
PRODUCTS(float, float, fp32)
PRODUCTS(bf16, Int8<bf16>, bf16_int8)
PRODUCTS(float, Int8<float>, fp32_int8)
PRODUCTS(bf16, Fp8<bf16>, bf16_fp8)
PRODUCTS(float, Fp8<float>, fp32_fp8)
PRODUCTS(bf16, Nibbles<bf16>, bf16_4bit)
PRODUCTS(float, Nibbles<float>, fp32_4bit)
KERNELS(bf16, bf16)
KERNELS(float, fp32)
