// Weights that are narrower than what this CPU multiplies: int8, and bf16 where it multiplies fp32 alone. They lie as what
// they are multiplied as would, and become that in registers, or for many rows in a cache.
#pragma once

#include "simd.h"

#ifdef __AVX512BF16__
constexpr bool MULTIPLIES_BF16 = true;
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif

template <class T>
struct Int8 {  // in products whose inputs and outputs are T
    int8_t value;
};

template <class W>
struct WideOf {
    using type = std::conditional_t<MULTIPLIES_BF16, W, float>;
};
template <class T>
struct WideOf<Int8<T>> : WideOf<T> {};

template <class W>
using Wide = typename WideOf<W>::type;  // what W is multiplied as

template <class W>
constexpr bool IS_NARROW = !std::is_same_v<W, Wide<W>>;

template <class T>
inline Vec load(const Int8<T>* p) { return load(&p->value); }

inline void widen_weights(const bf16* from, float* to, long n) { convert_row(from, to, n); }
template <class T, class I>
inline void widen_weights(const Int8<T>* from, I* to, long n) { convert_row(&from->value, to, n); }

#ifdef __AVX512BF16__
// LANES pairs as the dot product takes them.
inline __m512bh load_pairs(const bf16* pairs) { return (__m512bh)_mm512_loadu_si512(pairs); }
inline __m512bh load_pairs(const Int8<bf16>* pairs) {
    return _mm512_cvtne2ps_pbh((__m512)load(pairs + LANES), (__m512)load(pairs));
}
#endif
