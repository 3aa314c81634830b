// A sublayer of a transformer block, or all blocks of a stage, in one call. For few tokens, Python between the
// operations would take as long as the operations. `structs.py` has the same structures and checks their sizes.
#pragma once

#include "attention.h"
#include "collectives.h"
#include "experts.h"
#include "rows.h"

constexpr long QUICK_ROWS = 8;  // up to this number of rows, adding them takes less time than waking threads

// The attention metadata of a step. The members are described at `Rotation` and `Attention`.
struct AttentionMetadata {
    const long* slots;
    const int* tables;
    const long *table_rows, *context_lens, *starts;
    long tokens, sequences, block_size, width;
};

// norm, q, k and v projections, RoPE and KV-cache writes, attention, output projection.
template <class T, class W>
struct AttentionKernel {
    const T *norm_scale, *q_scale, *k_scale;  // scales of the norms; q_scale and k_scale may be null
    const W* weights[4];                      // of q, k, v and the output projection, packed
    const float* scales[4];
    const T* biases[4];
    long dim, heads, groups, head_dim, window;
    float eps;

    void run(const T* x, T* out, const Cache& cache, const T* cos, const T* sin, const AttentionMetadata& metadata,
             int threads) const {
        long tokens = metadata.tokens;
        long q_size = heads * head_dim, kv_size = groups * head_dim;
        T *q = scratch<T>(Q, tokens * q_size), *k = scratch<T>(K, tokens * kv_size), *v = scratch<T>(V, tokens * kv_size),
          *attended = scratch<T>(ATTENDED, tokens * q_size);
        auto norm = [&](long m, Input<W>* to) { norm_input(x + m * dim, norm_scale, to, dim, padded<W>(dim), eps); };
        linear_of<T, W>(norm,
                     {{weights[0], scales[0], biases[0], q_size, q},
                      {weights[1], scales[1], biases[1], kv_size, k},
                      {weights[2], scales[2], biases[2], kv_size, v}},
                     tokens, dim, threads);
        Rotation<T>{q, cache, k, v, q_scale, k_scale, cos, sin, metadata.slots, tokens, heads,
                    groups, head_dim, eps}
            .run(threads);
        AttentionShape shape{metadata.sequences, heads, groups, head_dim, metadata.block_size, metadata.width, window,
                             1 / std::sqrt(float(head_dim))};
        attend(q, cache, attended, metadata.tables, metadata.table_rows, metadata.context_lens, metadata.starts, shape,
               threads);
        linear<T, W>(attended, {{weights[3], scales[3], biases[3], dim, out}}, tokens, q_size, threads);
    }
};

// The K top experts of each row of logits [R, E] and their weights: softmax over all experts in fp32, the K weights
// renormalised to 1 if `normed`, and rounded to T.
template <class T>
void route(const T* logits, long rows, long experts, long choices, bool normed, long* ids, float* weights) {
    for (long r = 0; r < rows; r++, ids += choices, weights += choices) {
        float* left = scratch(ROW, experts);
        convert_row(logits + r * experts, left, experts);
        float most = *std::max_element(left, left + experts), total = 0, kept = 0;
        for (long e = 0; e < experts; e++) total += std::exp(left[e] - most);
        for (long c = 0; c < choices; c++) {
            ids[c] = std::max_element(left, left + experts) - left;
            kept += weights[c] = std::exp(left[ids[c]] - most) / total;
            left[ids[c]] = -INFINITY;
        }
        for (long c = 0; c < choices; c++) weights[c] = rounded<T>(normed ? weights[c] / kept : weights[c]);
    }
}

// norm and a dense SwiGLU, computed as one expert that all rows chose.
template <class T, class W>
struct FeedForwardKernel {
    const T* norm_scale;
    const W* weights[3];  // fc1, fc2, fc3, packed
    const float* scales[3];
    long dim, inner;
    float eps;

    void run(const T* x, T* out, long rows, int threads) const {
        std::vector<long> ids(rows, 0);
        auto norm = [&](long m, Input<W>* to) { norm_input(x + m * dim, norm_scale, to, dim, padded<W>(dim), eps); };
        Experts<T, W>{nullptr, weights[0], weights[1], weights[2], scales[0], scales[1], scales[2], ids.data(), nullptr,
                      out, nullptr, rows, 1, 1, dim, inner}
            .run(threads, norm);
    }
};

// norm, routing, and the chosen experts that this rank has.
template <class T, class W>
struct ExpertsKernel {
    const T *norm_scale, *gate;  // the gate [experts, dim] packed
    const W* weights[3];         // stacks of fc1, fc2, fc3
    const float* scales[3];
    // [tables, experts + 1] index of each expert in the stacks, -1: on another rank; by row % tables
    const long* places;
    long* counts;      // [local_experts]
    long tables, experts, local_experts, choices, norms_weights, dim, inner;
    float eps;

    void run(const T* x, T* out, long rows, int threads) const {
        T *normed = scratch<T>(NORMED, rows * dim), *logits = scratch<T>(Q, rows * experts);
        std::vector<long> ids(rows * choices);
        std::vector<float> routing(rows * choices);
        norm<T>(x, norm_scale, normed, rows, dim, eps, threads);
        linear<T, T>(normed, {{gate, nullptr, nullptr, experts, logits}}, rows, dim, threads);
        route<T>(logits, rows, experts, choices, norms_weights, ids.data(), routing.data());
        for (long i = 0; i < rows * choices; i++) ids[i] = places[i / choices % tables * (experts + 1) + ids[i]];
        Experts<T, W>{normed, weights[0], weights[1], weights[2], scales[0], scales[1], scales[2], ids.data(),
                      routing.data(), out, counts, rows, choices, local_experts, dim, inner}
            .run(threads);
    }
};

// The head's weights beside blocks of weights W: a quantised checkpoint's head is not quantised.
template <class T, class W>
using HeadWeight = std::conditional_t<HAS_GROUPS<W>, T, W>;

// The final norm and the product with this rank's rows of the vocabulary.
template <class T, class W>
struct Head {
    const T* norm_scale;
    const W* weight;
    const float* scale;
    long dim, outputs;
    float eps;
};

// The logits of some rows of the hidden states after the last block.
template <class T, class W>
struct Logits {
    const Head<T, W>* head;
    const long* rows;
    long count;
    T* out;  // [count, outputs]

    void run(const T* x, int threads) const {
        long dim = head->dim;
        auto norm = [&](long m, Input<W>* to) {
            norm_input(x + rows[m] * dim, head->norm_scale, to, dim, padded<W>(dim), head->eps);
        };
        linear_of<T, W>(norm, {{head->weight, head->scale, nullptr, head->outputs, out}}, count, dim, threads);
    }
};

template <class T, class W>
struct Block {
    const AttentionKernel<T, W>* attention;
    const FeedForwardKernel<T, W>* dense;  // null in a MoE block
    const ExpertsKernel<T, W>* experts;    // null in a dense block
};

// Runs all blocks with their residuals on x [tokens, dim], in place. Partial sums are all-reduced over `group`, which
// is null for a single rank; `operation` and the result are as in `Group`. Computes `logits` at the end if not null.
template <class T, class W>
long run_blocks(const Block<T, W>* blocks, long count, T* x, const Cache* caches, const T* cos, const T* sin,
                const AttentionMetadata& metadata, const Logits<T, HeadWeight<T, W>>* logits, const Group* group,
                long operation, int threads) {
    long dim = count ? blocks->attention->dim : 0, rows = metadata.tokens;
    T* part = scratch<T>(PARTIAL, rows * dim);
    auto add = [&] {
        if (group) return (operation = group->all_reduce(operation, part, x, x, rows * dim)) >= 0;
#pragma omp parallel for num_threads(threads) if (rows > QUICK_ROWS)
        for (long r = 0; r < rows; r++) add_row(x + r * dim, part + r * dim, dim);
        return true;
    };
    for (const auto* block = blocks; block < blocks + count; block++, caches++) {
        block->attention->run(x, part, *caches, cos, sin, metadata, threads);
        if (!add()) return -1;
        if (block->dense)
            block->dense->run(x, part, rows, threads);
        else
            block->experts->run(x, part, rows, threads);
        if (!add()) return -1;
    }
    if (logits && logits->count) logits->run(x, threads);
    return operation;
}
