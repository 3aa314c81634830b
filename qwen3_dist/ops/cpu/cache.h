// The KV cache of a layer: in the dtype of the activations, or as e4m3 codes with a scale for all keys and one for all
// values.
#pragma once

#include "narrow_weights.h"

// `Cache` in `structs.py`. keys and values [blocks, block_size, groups, dim] of T, or of Fp8<T> if `is_fp8`.
struct Cache {
    void *keys, *values;
    float key_scale, value_scale;  // by which codes are multiplied; 1 if there are none
    long is_fp8;
};

// Calls f with a null pointer to the type of the cache's numbers.
template <class T, class F>
inline void with_numbers_of(const Cache& cache, F f) {
    if (cache.is_fp8)
        f((Fp8<T>*)nullptr);
    else
        f((T*)nullptr);
}

// Stores the nearest codes, ties to even. What is beyond the largest code becomes that: no code is infinite, and the
// code of NaN is not used. Below 2^-6 codes are multiples of 2^-9, which the last bits of a float near 2^14 are too.
template <class T>
inline void store(Fp8<T>* p, Vec x) {
    constexpr uint32_t BIAS = (127 - 7) << 3;  // of a float's exponent over a code's
    Words word = (Words)x;
    Vec size = smaller((Vec)(word & 0x7fffffff), Vec{} + 448.0f);
    Words bits = (Words)size, usual = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - BIAS;
    Words small = (Words)(size + 0x1p14f) - (uint32_t(127 + 14) << 23);
    Words code = (Words)(size < 0x1p-6f ? (Vec)small : (Vec)usual) | ((word >> 24) & 0x80);
    Bytes bytes = __builtin_convertvector((Integers)code, Bytes);
    memcpy(p, &bytes, sizeof bytes);
}

template <class T>
inline float widen(Fp8<T> x) {
    Fp8<T> codes[LANES] = {x};
    return load(codes)[0];
}

// out = the codes of x / scale for a row of n numbers. It multiplies by the reciprocal, as other devices do.
template <class T>
inline void encode_row(const T* x, float scale, Fp8<T>* out, long n) {
    float by = float(1 / double(scale));
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, load(x + i) * by);
    T last[LANES] = {};
    Fp8<T> codes[LANES];
    std::copy(x + i, x + n, last);
    store(codes, load(last) * by);
    std::copy(codes, codes + n - i, out + i);
}

#ifdef __AVX512BF16__
inline Vec multiply_add(Vec sum, const bf16* a, const Fp8<bf16>* b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), load_pairs(b));
}
#endif
