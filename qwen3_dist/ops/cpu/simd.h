// Vectors of floats in the compiler's vector type, so that the same source compiles for AVX2, AVX-512 and others.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

// Compiled for deterministic mode: the result of a row is the same bits for any number of rows around it. There each
// operation has one way to compute, whichever would be fastest.
#ifdef DETERMINISTIC
constexpr bool FIXED_WAY = true;
#else
constexpr bool FIXED_WAY = false;
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(bf16 x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float out;
    memcpy(&out, &word, 4);
    return out;
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, bf16& out) {  // to nearest, ties to even
    uint32_t word;
    memcpy(&word, &x, 4);
    out.bits = std::isnan(x) ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

template <class T, class I>
inline void convert(T x, I& out) {
    if constexpr (std::is_same_v<T, I>)
        out = x;
    else
        narrow(widen(x), out);
}

template <class T>
inline float rounded(float x) {
    T out;
    narrow(x, out);
    return widen(out);
}

// Intrinsics for conversions that GCC 12 compiles to several instructions.
inline Words widened(Halves x) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Words);
#endif
}

inline Integers widened(const int8_t* p) {
#if defined(__AVX512F__)
    return (Integers)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    return (Integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Integers);
#endif
}

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec load(const bf16* p) {
    return (Vec)(widened(*reinterpret_cast<const Halves*>(p)) << 16);
}
inline Vec load(const int8_t* p) { return __builtin_convertvector(widened(p), Vec); }
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
inline Halves narrowed(Vec x) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    Words words = (Words)x, nearest = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
    Words not_numbers = (Words)(x != x);
    return __builtin_convertvector((nearest & ~not_numbers) | (not_numbers & 0x7fc0), Halves);
#endif
}
inline void store(bf16* p, Vec x) { *reinterpret_cast<Halves*>(p) = narrowed(x); }

template <class T>
inline Vec rounded(Vec x) {
    if constexpr (sizeof(T) == sizeof(float))
        return x;
    else
        return (Vec)(widened(narrowed(x)) << 16);
}

// Rounds to T, then stores.
template <class T, class I>
inline void store_rounded(I* p, Vec x) {
    if constexpr (std::is_same_v<T, I>)
        store(p, x);
    else
        store(p, rounded<T>(x));
}

// Swaps the upper S of every 2S lanes of a with the lower S of b.
template <int S, class V, int... L>
inline void swap_lanes(V& a, V& b, std::integer_sequence<int, L...>) {
    V low = __builtin_shufflevector(a, b, (L & S ? LANES + L - S : L)...);
    b = __builtin_shufflevector(a, b, (L & S ? LANES + L : L + S)...);
    a = low;
}

// Reduces the lanes of each of LANES vectors by `join`. Lane i of the result is for vector i.
template <int S = LANES / 2, class F>
inline Vec joined(Vec (&x)[LANES], F join) {
    for (int i = 0; i < S; i++) {
        swap_lanes<S>(x[i], x[i + S], std::make_integer_sequence<int, LANES>());
        x[i] = join(x[i], x[i + S]);
    }
    if constexpr (S > 1) joined<S / 2>(x, join);
    return x[0];
}

inline Vec sums(Vec (&x)[LANES]) {
    return joined(x, [](Vec a, Vec b) { return a + b; });
}

template <int BY, int... L>
inline Vec rotated(Vec x, std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(x, x, ((L + BY) % LANES)...);
}

template <int WIDTH = LANES>
inline float sum(Vec x) {
    if constexpr (WIDTH == 1)
        return x[0];
    else
        return sum<WIDTH / 2>(x + rotated<WIDTH / 2>(x, std::make_integer_sequence<int, LANES>()));
}

#ifdef __AVX512F__
inline Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec smaller(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
inline Vec nearest_whole(Vec x) { return (Vec)_mm512_roundscale_ps((__m512)x, 0); }
inline Vec times_power_of_two(Vec x, Vec n) { return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n); }
#else
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
inline Vec nearest_whole(Vec x) {
    return __builtin_convertvector(__builtin_convertvector(x + (x < 0 ? Vec{} - 0.5f : Vec{} + 0.5f), Integers), Vec);
}
inline Vec times_power_of_two(Vec x, Vec n) { return x * (Vec)((__builtin_convertvector(n, Integers) + 127) << 23); }
#endif

inline Vec largest(Vec (&x)[LANES]) { return joined(x, larger); }

template <int WIDTH = LANES>
inline float largest(Vec x) {
    if constexpr (WIDTH == 1)
        return x[0];
    else
        return largest<WIDTH / 2>(larger(x, rotated<WIDTH / 2>(x, std::make_integer_sequence<int, LANES>())));
}

// exp(x) with a relative error below 4e-7 for -87 < x < 88, and exp(-87) below that: 2^n by the bits of the exponent,
// the rest by the minimax polynomial of relative error 1e-7 over half an octave to each side, with exp(0) = 1.
inline Vec exp(Vec x) {
    x = larger(x, Vec{} - 87.0f);
    Vec n = nearest_whole(x * 1.44269504f), r = x - n * 0.693147181f;
    Vec power = ((((r * 0.00829031452f + 0.0418979305f) * r + 0.166676362f) * r + 0.499991495f) * r + 0.999999707f) * r + 1;
    return times_power_of_two(power, n);
}

// x * sigmoid(x), rounded to T.
template <class T>
inline Vec silu(Vec x) { return rounded<T>(x / (exp(smaller(-x, Vec{} + 88.0f)) + 1)); }

template <class T, class I>
inline void convert_row(const T* from, I* to, long n) {
    if constexpr (std::is_same_v<T, I>) {
        memcpy(to, from, n * sizeof(T));
    } else {
        long i = 0;
        for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
        for (; i < n; i++) convert(from[i], to[i]);
    }
}
