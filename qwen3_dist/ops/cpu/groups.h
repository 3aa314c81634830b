// Products with codes whose scales cover groups of inputs. A scale of a block of outputs is kept for each of its outputs.
#pragma once

#include "codes.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// The bits of the 128 codes without sign as bf16: upper and lower bytes.
struct CodeBits {
    alignas(LINE) uint8_t upper[128] = {}, lower[128] = {};

    constexpr CodeBits() {
        constexpr int small[] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};  // of exponent 0
        for (int code = 0; code < 128; code++) {
            int bits = code < 8 ? small[code] : (code << 4) + (120 << 7);
            upper[code] = uint8_t(bits >> 8), lower[code] = uint8_t(bits);
        }
    }
};
inline constexpr CodeBits CODE_BITS;

// `multiply` for the codes of two inputs of a panel at a time, which are looked up. acc[m][0] has every other four
// outputs, and acc[m][1] the four after each.
template <int M>
inline void multiply(Vec (&acc)[M][2], const bf16* x, long ldx, const Fp8<bf16>* w, long k) {
    auto table = [](const uint8_t* p) { return _mm512_load_si512(p); };
    __m512i code = _mm512_loadu_si512(w + k * PANEL);
    __m512i upper = _mm512_permutex2var_epi8(table(CODE_BITS.upper), code, table(CODE_BITS.upper + 64));
    __m512i lower = _mm512_permutex2var_epi8(table(CODE_BITS.lower), code, table(CODE_BITS.lower + 64));
    upper = _mm512_ternarylogic_epi32(upper, code, _mm512_set1_epi8(-128), 0xf8);  // upper | code & sign
    auto even = (__m512bh)_mm512_unpacklo_epi8(lower, upper), odd = (__m512bh)_mm512_unpackhi_epi8(lower, upper);
    for (int m = 0; m < M; m++) {
        int pair;
        memcpy(&pair, x + m * ldx + k, 4);
        auto input = (__m512bh)_mm512_set1_epi32(pair);
        acc[m][0] = (Vec)_mm512_dpbf16_ps((__m512)acc[m][0], input, even);
        acc[m][1] = (Vec)_mm512_dpbf16_ps((__m512)acc[m][1], input, odd);
    }
}

inline void put_in_order(Vec (&sums)[2], const Fp8<bf16>*) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    __m512 even = (__m512)sums[0], odd = (__m512)sums[1];
    sums[0] = (Vec)_mm512_permutex2var_ps(even, first, odd);
    sums[1] = (Vec)_mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd);
}
#endif
template <class W>
inline void put_in_order(Vec (&)[2], const W*) {}

// How codes of a kind are read in a group of a panel, of which the zeros are the same for all inputs.
template <Kind KIND, class W>
struct Reader {
    Zeroed<KIND, W> zeroed;

    Reader(const Groups& groups, long panel, long g) : zeroed(groups, panel, g) {}

    template <int M>
    void multiply_codes(Vec (&acc)[M][2], const Input<W>* x, long ldx, const W* w, long k) const {
        multiply_by<M>(acc, x, ldx, zeroed.get(w, k, 0), zeroed.get(w, k, 1), k);
    }
    void order(Vec (&)[2]) const {}
};

template <class T>
struct Reader<FP8_CODES, Fp8<T>> {
    Reader(const Groups&, long, long) {}

    template <int M>
    void multiply_codes(Vec (&acc)[M][2], const Input<Fp8<T>>* x, long ldx, const Fp8<T>* w, long k) const {
        multiply<M>(acc, x, ldx, w, k);
    }
    void order(Vec (&sums)[2]) const { put_in_order(sums, (const Fp8<T>*)nullptr); }
};

// out[m][n] = scales[n] * x[m] . w[n] for M rows, a panel and some inputs; or += if they are not the first.
template <int M, Kind KIND, class W>
[[gnu::noinline]] void scaled_tile(const Input<W>* x, long ldx, const W* w, long inputs, const Groups& groups, long panel,
                                   long g, float* out, long ldo) {
    Vec acc[M][2] = {};
    const Reader<KIND, W> reader(groups, panel, g);
    for (long k = 0; k < inputs; k += PAIR<W>) {
        for (size_t at = 0; M >= PREFETCH_ROWS && at < PANEL * PAIR<W> * sizeof(W) / PER_ITEM<W>; at += LINE)
            __builtin_prefetch((const char*)after(w, k * PANEL) + PREFETCH_BYTES + at, 0, 2);
        reader.template multiply_codes<M>(acc, x, ldx, w, k);
    }
    const float* scales = groups.scales(panel, g);
    bool first = g == 0;
    for (int m = 0; m < M; m++) {
        reader.order(acc[m]);
        for (int h = 0; h < 2; h++) {
            float* to = out + m * ldo + h * LANES;
            Vec sum = acc[m][h] * load(scales + h * LANES);
            store(to, first ? sum : sum + load(to));
        }
    }
}

constexpr int CODED_ROWS = TILE_ROWS * 2 / 3;  // rows of a register tile: widening codes takes registers too

template <Kind KIND, class W, int M = CODED_ROWS>
inline void scaled_tile_of(long rows, const Input<W>* x, long ldx, const W* w, long inputs, const Groups& groups,
                           long panel, long g, float* out, long ldo) {
    if constexpr (M > 1)
        if (rows < M) return scaled_tile_of<KIND, W, M - 1>(rows, x, ldx, w, inputs, groups, panel, g, out, ldo);
    scaled_tile<M, KIND>(x, ldx, w, inputs, groups, panel, g, out, ldo);
}

// wide = the weights of a panel's codes, rounded to the type that they are multiplied as.
template <Kind KIND, class W>
void widen_panel(const W* codes, Wide<W>* wide, const Groups& groups, long panel, long depth) {
    for (long k = 0; k < depth; k += PAIR<W>) {
        long g[PAIR<W>];
        for (long i = 0; i < PAIR<W>; i++) g[i] = groups.of_input(k + i);
        for (int h = 0; h < 2; h++) {
            Vec made[PAIR<W>];
            for (long i = 0; i < PAIR<W>; i++)
                made[i] = (number<KIND>(codes, k, i, h) - groups.zeros(panel, g[i], h)) *
                          load(groups.scales(panel, g[i]) + h * LANES);
            store_word(wide + k * PANEL + h * LANES * PAIR<W>, made);
        }
    }
}

template <class W>
void widen_fp8_panel(const W* codes, Wide<W>* wide, const Groups& groups, long panel, long depth) {
    constexpr long WORD = PANEL * PAIR<W>;
    alignas(LINE) float scales[WORD];
    for (long k = 0, g = 0, end = 0; k < depth; k += PAIR<W>, codes += WORD, wide += WORD) {
        if (k + PAIR<W> > end) {
            for (long i = 0; i < PAIR<W>; i++) {
                while (g + 1 < groups.count && k + i >= groups.end(g, depth)) g++;
                for (long c = 0; c < PANEL; c++) scales[c * PAIR<W> + i] = groups.scales(panel, g)[c];
            }
            bool mixed = g && k < groups.end(g - 1, depth);
            end = mixed ? k : groups.end(g, depth);  // after a word of two groups come words of one
        }
        for (long i = 0; i < WORD; i += LANES) store(wide + i, load(codes + i) * load(scales + i));
    }
}

// `block_product` for codes of a kind: w and `panel` are the first of `count` panels. Few rows multiply codes and scale
// the sums of each group; for many, and always in deterministic mode, the weights of a panel are made first.
template <Kind KIND, class W, class F>
inline void product_of_kind(const Input<W>* x, long ldx, long rows, const W* w, const Groups& groups, long panel,
                            long count, long depth, float* out, long ldo, F done) {
    bool few = !FIXED_WAY && rows <= WIDENED_AFTER && !(rows > TILE_ROWS && uses_matrix_unit(rows)) &&
               groups.have_whole_words(PAIR<W>);
    for (long p = 0; p < count; p++, w = after(w, PANEL * depth)) {
        float* sums = out + p * PANEL;
        if (!few) {
            auto wide = scratch<Wide<W>>(WIDENED, PANEL * depth);
            if constexpr (KIND == FP8_CODES)
                widen_fp8_panel(w, wide, groups, panel + p, depth);
            else
                widen_panel<KIND>(w, wide, groups, panel + p, depth);
            block_product<Wide<W>>(x, ldx, rows, wide, 1, depth, sums, ldo,
                                   [&](long, long, long m, long some) { done(p, 1, m, some); });
            continue;
        }
        long tiles = (rows + CODED_ROWS - 1) / CODED_ROWS;
        for (long g = 0, k = 0; g < groups.count; k = groups.end(g++, depth))
            for (long t = 0, m = 0; t < tiles; t++) {
                long some = (rows - m) / (tiles - t);
                scaled_tile_of<KIND>(some, x + m * ldx + k, ldx, after(w, k * PANEL), groups.end(g, depth) - k, groups,
                                     panel + p, g, sums + m * ldo, ldo);
                m += some;
            }
        done(p, 1, 0, rows);
    }
}

template <class W, class F>
inline void grouped_product(const Input<W>* x, long ldx, long rows, const W* w, const Groups& groups, long panel,
                            long count, long depth, float* out, long ldo, F done) {
    constexpr Kind USUAL = PER_ITEM<W> == 2 ? INT4_CODES : FP8_CODES, OTHER = PER_ITEM<W> == 2 ? FP4_CODES : INT8_CODES;
    if (groups.kind == USUAL)
        product_of_kind<USUAL>(x, ldx, rows, w, groups, panel, count, depth, out, ldo, done);
    else
        product_of_kind<OTHER>(x, ldx, rows, w, groups, panel, count, depth, out, ldo, done);
}
