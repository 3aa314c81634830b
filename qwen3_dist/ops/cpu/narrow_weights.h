// Narrow weights: int8, and bf16 on CPUs that multiply fp32 only. They are packed in the order of the wide type that
// they are multiplied as, and converted to it in registers or, for many rows, in a buffer.
#pragma once

#include "simd.h"

#ifdef __AVX512BF16__
constexpr bool MULTIPLIES_BF16 = true;
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif

template <class T>
struct Int8 {  // a weight of products whose inputs and outputs are T
    int8_t value;
};

template <class W>
struct WideOf {
    using type = std::conditional_t<MULTIPLIES_BF16, W, float>;
};
template <class T>
struct WideOf<Int8<T>> : WideOf<T> {};

template <class W>
using Wide = typename WideOf<W>::type;  // the type that W is multiplied as

template <class W>
constexpr bool IS_NARROW = !std::is_same_v<W, Wide<W>>;

template <class T>
inline Vec load(const Int8<T>* p) { return load(&p->value); }

inline void widen_weights(const bf16* from, float* to, long n) { convert_row(from, to, n); }
template <class T, class I>
inline void widen_weights(const Int8<T>* from, I* to, long n) { convert_row(&from->value, to, n); }

#ifdef __AVX512BF16__
// LANES pairs for the dot-product instruction.
inline __m512bh load_pairs(const bf16* pairs) { return (__m512bh)_mm512_loadu_si512(pairs); }
inline __m512bh load_pairs(const Int8<bf16>* pairs) {
    return _mm512_cvtne2ps_pbh((__m512)load(pairs + LANES), (__m512)load(pairs));
}
#endif
