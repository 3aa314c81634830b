// Codes in packed panels, the scales and zeros that belong to them, and the numbers that they stand for.
#pragma once

#include "panels.h"

enum Kind { FP8_CODES, INT8_CODES, INT4_CODES, FP4_CODES };

// What belongs to the codes of a packed matrix: a header of PANEL numbers, the group of each input (int32) if the inputs
// have any order, and [panels][groups] of PANEL scales and, if codes have zeros of their own, PANEL int8 zeros.
class Groups {
public:
    explicit Groups(const float* packed)
        : group(long(packed[0])), before(long(packed[1])), count(long(packed[2])), kind(Kind(packed[3])),
          has_zeros(packed[4] != 0), ordered(long(packed[5])), packed(packed) {}

    // Those of `matrix` among several of as many panels.
    Groups of_matrix(long matrix, long panels) const {
        return Groups(packed + matrix * (PANEL + ordered + panels * count * size()));
    }

    const float* scales(long panel, long g) const { return packed + PANEL + ordered + (panel * count + g) * size(); }

    Vec zeros(long panel, long g, int half) const {
        if (!has_zeros) return Vec{} + (kind == INT4_CODES ? 8.0f : 0.0f);
        return load((const int8_t*)(scales(panel, g) + PANEL) + half * LANES);
    }

    // The first input after group g. The last group has the padding too.
    long end(long g, long depth) const { return g + 1 < count ? (g + 1) * group - before : depth; }

    long of_input(long k) const {
        if (ordered) return k < ordered ? ((const int32_t*)(packed + PANEL))[k] : 0;
        return std::min((k + before) / group, count - 1);
    }

    // Whether inputs lie in order, and no word of PAIR inputs in two groups.
    bool have_whole_words(long pair) const { return !ordered && group % pair == 0 && before % pair == 0; }

    const long group, before, count;  // inputs of a group, those of the first that lie before the first input, groups
    const Kind kind;
    const bool has_zeros;
    const long ordered;  // inputs that have any order; 0: none

private:
    long size() const { return PANEL + (has_zeros ? PANEL / 4 : 0); }

    const float* packed;
};

// e2m1: a sign, 2 bits of exponent with bias 1, and 1 bit of mantissa; as `load` of e4m3 codes.
inline Vec fp4_values(Words code) {
    Words bits = (code & 7) << 22;
    Vec usual = (Vec)(bits + (126u << 23)), small = (Vec)(bits + (127u << 23)) - 1.0f;
    return (Vec)((Words)(bits < (1u << 23) ? small : usual) | (code & 8) << 28);
}

inline Words widened_bytes(const uint8_t* p) { return (Words)widened((const int8_t*)p) & 0xff; }

// What the codes of half h of a panel say for input k + i of the word that begins with input k; fp32, without zeros.
template <Kind KIND, class T>
inline Vec number(const Nibbles<T>* w, long k, long i, int h) {
    constexpr bool PAIRS = PAIR<Nibbles<T>> == 2;
    const uint8_t* bytes = &after(w, k * PANEL)->codes + (PAIRS ? h * LANES : 0);
    Words code = widened_bytes(bytes) >> (PAIRS ? 4 * i : 4 * h) & 15;
    if constexpr (KIND == FP4_CODES)
        return fp4_values(code);
    else
        return __builtin_convertvector((Integers)code, Vec);
}

template <Kind KIND, class T>
inline Vec number(const Fp8<T>* w, long k, long i, int h) {
    static_assert(KIND == INT8_CODES);
    const int8_t* bytes = &w[k * PANEL].code + h * LANES * PAIR<Fp8<T>>;
    if constexpr (PAIR<Fp8<T>> == 1) return load(bytes);
    Words pairs = widened(*(const Halves*)bytes);
    return __builtin_convertvector((Integers)(pairs << (i ? 16 : 24)) >> 24, Vec);
}

// Stores a word of weights for half a panel.
inline void store_word(float* to, const Vec (&made)[1]) { store(to, made[0]); }
template <class I>
inline void store_word(I* to, const Vec (&made)[2]) {
    Words words = widened(narrowed(made[0])) | widened(narrowed(made[1])) << 16;
    memcpy(to, &words, sizeof words);
}

// Codes less the zeros of a group, for half a panel: fp32, or pairs of bf16.
template <Kind KIND, class W>
struct Zeroed {
    Vec zeros[2];

    Zeroed(const Groups& groups, long panel, long g) : zeros{groups.zeros(panel, g, 0), groups.zeros(panel, g, 1)} {}

    auto get(const W* w, long k, int h) const {
        if constexpr (PAIR<W> == 1) {
            return number<KIND>(w, k, 0, h) - zeros[h];
        } else {
            Vec made[] = {number<KIND>(w, k, 0, h) - zeros[h], number<KIND>(w, k, 1, h) - zeros[h]};
            return widened(narrowed(made[0])) | widened(narrowed(made[1])) << 16;
        }
    }
};

#ifdef __AVX512BF16__
// The bits of numbers as bf16: of -16 to 15, and of e2m1 codes.
alignas(LINE) inline constexpr uint16_t INTEGERS[32] = {
    0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130,
    0x4140, 0x4150, 0x4160, 0x4170};
alignas(LINE) inline constexpr uint16_t E2M1[32] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
                                                    0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};

// A byte becomes the places of its two codes in a table.
template <Kind KIND>
struct Zeroed<KIND, Nibbles<bf16>> {
    __m512i table, first[2];

    Zeroed(const Groups& groups, long panel, long g) : table(_mm512_load_si512(KIND == INT4_CODES ? INTEGERS : E2M1)) {
        for (int h = 0; h < 2; h++) {
            Words place = (Words)__builtin_convertvector(16 - groups.zeros(panel, g, h), Integers);
            first[h] = KIND == INT4_CODES ? (__m512i)(place | place << 16) : __m512i{};
        }
    }

    Words get(const Nibbles<bf16>* w, long k, int h) const {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)after(w, k * PANEL) + h));
        __m512i codes = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
        codes = _mm512_and_si512(codes, _mm512_set1_epi32(0x000f000f));
        return (Words)_mm512_permutexvar_epi16(_mm512_add_epi16(codes, first[h]), table);
    }
};

template <int M>
inline void multiply_by(Vec (&acc)[M][2], const bf16* x, long ldx, Words low, Words high, long k) {
    for (int m = 0; m < M; m++) {
        int pair;
        memcpy(&pair, x + m * ldx + k, 4);
        auto input = (__m512bh)_mm512_set1_epi32(pair);
        acc[m][0] = (Vec)_mm512_dpbf16_ps((__m512)acc[m][0], input, (__m512bh)low);
        acc[m][1] = (Vec)_mm512_dpbf16_ps((__m512)acc[m][1], input, (__m512bh)high);
    }
}
#endif
template <int M>
inline void multiply_by(Vec (&acc)[M][2], const float* x, long ldx, Vec low, Vec high, long k) {
    for (int m = 0; m < M; m++) {
        acc[m][0] += low * x[m * ldx + k];
        acc[m][1] += high * x[m * ldx + k];
    }
}

// Packs codes of 4 bits, of which rows of w have two inputs in a byte; `inner` is even.
template <class T>
void pack(const Nibbles<T>* w, Nibbles<T>* out, long outputs, long inner, int threads) {
    constexpr bool PAIRS = PAIR<Nibbles<T>> == 2;
    long depth = padded<Nibbles<T>>(inner);
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < panels(outputs); p++) {
        uint8_t* to = &out[p * PANEL * depth / 2].codes;
        for (long k = 0; k < depth; k += 2)
            for (long c = 0; c < PANEL; c++) {
                long n = p * PANEL + c;
                uint8_t codes = n < outputs && k < inner ? w[(n * inner + k) / 2].codes : 0;
                if (PAIRS) {
                    to[k / 2 * PANEL + c] = codes;
                } else {
                    int shift = c < LANES ? 0 : 4;
                    uint8_t *first = to + k * LANES + c % LANES, *second = first + LANES;
                    *first = uint8_t(shift ? *first | (codes & 15) << 4 : codes & 15);
                    *second = uint8_t(shift ? *second | (codes & 0xf0) : codes >> 4);
                }
            }
    }
}
