// Narrow weights: int8, fp8, codes of 4 bits, and bf16 on CPUs that multiply fp32 only. They are packed in the order of the wide type that
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

template <class T>
struct Fp8 {  // an e4m3 code of such a weight, to be multiplied by the scale of its group of inputs
    int8_t code;
};

template <class T>
struct Nibbles {  // two codes of 4 bits of such weights
    uint8_t codes;
};

template <class W>
constexpr bool HAS_GROUPS = false;
template <class T>
constexpr bool HAS_GROUPS<Fp8<T>> = true;
template <class T>
constexpr bool HAS_GROUPS<Nibbles<T>> = true;

template <class W>
constexpr long PER_ITEM = 1;  // weights in a W
template <class T>
constexpr long PER_ITEM<Nibbles<T>> = 2;

// What is `count` weights after w.
template <class W>
inline const W* after(const W* w, long count) { return w + count / PER_ITEM<W>; }

template <class W>
struct WideOf {
    using type = std::conditional_t<MULTIPLIES_BF16, W, float>;
};
template <class T>
struct WideOf<Int8<T>> : WideOf<T> {};
template <class T>
struct WideOf<Fp8<T>> : WideOf<T> {};
template <class T>
struct WideOf<Nibbles<T>> : WideOf<T> {};

template <class W>
using Wide = typename WideOf<W>::type;  // the type that W is multiplied as

template <class W>
constexpr bool IS_NARROW = !std::is_same_v<W, Wide<W>>;

template <class T>
inline Vec load(const Int8<T>* p) { return load(&p->value); }

// A code is a sign, 4 bits of exponent with bias 7, and 3 bits of mantissa: a half-precision number with bias 7 in place
// of 15. Without an instruction for these, the bits become those of a float. Exponent 0 has no hidden one: there the
// float is made with it, and it is subtracted.
template <class T>
inline Vec load(const Fp8<T>* p) {
#if defined(__AVX512F__)
    __m256i halves = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
    return (Vec)_mm512_cvtph_ps(_mm256_and_si256(halves, _mm256_set1_epi16(int16_t(0xbfff)))) * 256.0f;
#elif defined(__AVX2__) && defined(__F16C__)
    __m128i halves = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
    return (Vec)_mm256_cvtph_ps(_mm_and_si128(halves, _mm_set1_epi16(int16_t(0xbfff)))) * 256.0f;
#else
    Words code = (Words)widened(&p->code), bits = (code & 0x7f) << 20;
    Vec usual = (Vec)(bits + (120u << 23)), small = (Vec)(bits + (121u << 23)) - 0x1p-6f;
    return (Vec)((Words)(bits < (1u << 23) ? small : usual) | (code & 0x80000000u));
#endif
}

inline void widen_weights(const bf16* from, float* to, long n) { convert_row(from, to, n); }
template <class T, class I>
inline void widen_weights(const Int8<T>* from, I* to, long n) { convert_row(&from->value, to, n); }

#ifdef __AVX512BF16__
// LANES pairs for the dot-product instruction.
inline __m512bh load_pairs(const bf16* pairs) { return (__m512bh)_mm512_loadu_si512(pairs); }
inline __m512bh load_pairs(const Int8<bf16>* pairs) {
    return _mm512_cvtne2ps_pbh((__m512)load(pairs + LANES), (__m512)load(pairs));
}
// As `load`, in 16 bits; the codes of exponent 0 are looked up.
inline __m512bh load_pairs(const Fp8<bf16>* pairs) {
    const __m512i small = _mm512_castsi128_si512(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)pairs));
    __m512i bits = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x7f)), 4);
    bits = _mm512_add_epi16(bits, _mm512_set1_epi16(120 << 7));
    bits = _mm512_mask_permutexvar_epi16(bits, _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x78)), code, small);
    return (__m512bh)_mm512_or_si512(bits, _mm512_and_si512(code, _mm512_set1_epi16(int16_t(0x8000))));
}
#endif
