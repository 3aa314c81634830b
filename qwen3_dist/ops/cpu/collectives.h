// Collectives of ranks that share memory. `parallel/shared_memory.py` describes the segment and the protocol. Each
// function takes the number of the group's last operation and returns the number of its own last one, or -1 if
// `Group::wait` found that a peer is lost.
#pragma once

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "simd.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

constexpr long FLAG_WORDS = 16;  // distance between the flags of two ranks
constexpr int SPINS = 300;       // few, as ranks may outnumber cores
// a time and no count: a yield takes long if other processes want the core
constexpr std::chrono::milliseconds YIELDING{2};

#ifdef __F16C__
struct fp16 {
    uint16_t bits;
};
inline float widen(fp16 x) { return _cvtsh_ss(x.bits); }
inline void narrow(float x, fp16& out) { out.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline Vec load(const fp16* p) {
    Vec out;
    for (int lane = 0; lane < LANES; lane += 8)
        _mm256_storeu_ps(reinterpret_cast<float*>(&out) + lane,
                         _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + lane))));
    return out;
}
inline void store(fp16* p, Vec x) {
    for (int lane = 0; lane < LANES; lane += 8)
        _mm_storeu_si128((__m128i*)(p + lane), _mm256_cvtps_ph(_mm256_loadu_ps(reinterpret_cast<float*>(&x) + lane),
                                                               _MM_FROUND_TO_NEAREST_INT));
}
#endif

// The time in ticks of constant length. A rank waits a hundred times in a step, and a clock's call takes three times as
// long.
inline long ticks() {
#ifdef __x86_64__
    return long(__rdtsc());
#else
    return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

// `Group` in `structs.py`.
struct Group {
    long* flags;                                // the last operation that each rank has published
    char* slots;                                // [2, size, slot_bytes]
    long rank, size, slot_bytes;
    int (*wait)(long peer, long operation);     // waits further and watches the peers' processes; 0 if one is lost
    mutable long waited_ticks;                  // how long this rank has waited for others so far, see `ticks`

    char* slot(long operation, long peer) const { return slots + (operation % 2 * size + peer) * slot_bytes; }

    bool has(long peer, long operation) const {
        return __atomic_load_n(flags + peer * FLAG_WORDS, __ATOMIC_ACQUIRE) >= operation;
    }

    bool await(long peer, long operation) const {
        for (int i = 0; i < SPINS; i++) {
            if (has(peer, operation)) return true;
#ifdef __x86_64__
            _mm_pause();
#endif
        }
        auto end = std::chrono::steady_clock::now() + YIELDING;
        while (std::chrono::steady_clock::now() < end) {
            if (has(peer, operation)) return true;
            sched_yield();
        }
        return wait(peer, operation);
    }

    // Publishes this rank's operation and waits until every rank has published it.
    bool exchange(long operation) const {
        __atomic_store_n(flags + rank * FLAG_WORDS, operation, __ATOMIC_RELEASE);
        for (long peer = 0; peer < size; peer++) {
            if (has(peer, operation)) continue;
            long began = ticks();
            if (!await(peer, operation)) return false;
            waited_ticks += ticks() - began;
        }
        return true;
    }

    // For each part [lo, lo + n) of `total` that fits a slot: calls put(slot, lo, n), exchanges, and calls
    // take(operation, lo, n).
    template <class Put, class Take>
    long rounds(long operation, long total, long capacity, Put put, Take take) const {
        long lo = 0;
        do {
            long n = total - lo < capacity ? total - lo : capacity;
            put(slot(++operation, rank), lo, n);
            if (!exchange(operation)) return -1;
            take(operation, lo, n);
            lo += n;
        } while (lo < total);
        return operation;
    }

    // out [n] = (addend +) the sum over ranks of the numbers from `skip` on in their slots. The sum is in fp32, in rank
    // order, and is rounded to T before the addend is added.
    template <class T>
    void sum(long operation, long skip, const T* mine, const T* addend, T* out, long n) const {
        std::vector<const T*> parts(size);
        for (long peer = 0; peer < size; peer++)
            parts[peer] = peer == rank ? mine : reinterpret_cast<const T*>(slot(operation, peer)) + skip;
        long i = 0;
        for (; i + LANES <= n; i += LANES) {
            Vec total = load(parts[0] + i);
            for (long peer = 1; peer < size; peer++) total += load(parts[peer] + i);
            if (addend) {
                T narrowed[LANES];
                store(narrowed, total);
                total = load(narrowed) + load(addend + i);
            }
            store(out + i, total);
        }
        for (; i < n; i++) {
            float total = widen(parts[0][i]);
            for (long peer = 1; peer < size; peer++) total += widen(parts[peer][i]);
            narrow(addend ? widen(addend[i]) + rounded<T>(total) : total, out[i]);
        }
    }

    // out [n] = (addend [n] +) the sum over ranks of x [n]; out may be x or the addend.
    template <class T>
    long all_reduce(long operation, const T* x, const T* addend, T* out, long total) const {
        return rounds(
            operation, total, slot_bytes / long(sizeof(T)),
            [&](char* to, long lo, long n) { memcpy(to, x + lo, n * sizeof(T)); },
            [&](long at, long lo, long n) { sum(at, 0, x + lo, addend ? addend + lo : nullptr, out + lo, n); });
    }

    // out [n] = this rank's piece of the sum over ranks of x [size, n].
    template <class T>
    long reduce_scatter(long operation, const T* x, T* out, long total) const {
        return rounds(
            operation, total, slot_bytes / long(sizeof(T)) / size,
            [&](char* to, long lo, long n) {
                for (long peer = 0; peer < size; peer++)
                    if (peer != rank) memcpy(to + peer * n * sizeof(T), x + peer * total + lo, n * sizeof(T));
            },
            [&](long at, long lo, long n) {
                sum<T>(at, rank * n, x + rank * total + lo, nullptr, out + lo, n);
            });
    }

    // out [rows, size, row bytes] = x [rows, row bytes] of all ranks. A rank with a null `out` gets nothing; a rank
    // contributes its x if it `gives`.
    long gather(long operation, const char* x, char* out, long total, long row, bool gives) const {
        return rounds(
            operation, total, slot_bytes,
            [&](char* to, long lo, long n) {
                if (gives) memcpy(to, x + lo, n);
            },
            [&](long at, long lo, long n) {
                for (long peer = 0; out && peer < size; peer++) {
                    const char* from = (peer == rank ? x + lo : slot(at, peer)) - lo;
                    for (long i = lo, end; i < lo + n; i = end) {
                        end = std::min(lo + n, (i / row + 1) * row);
                        memcpy(out + (i / row * size + peer) * row + i % row, from + i, end - i);
                    }
                }
            });
    }

    // x [bytes] = x of rank 0.
    long broadcast(long operation, char* x, long total) const {
        return rounds(
            operation, total, slot_bytes,
            [&](char* to, long lo, long n) {
                if (rank == 0) memcpy(to, x + lo, n);
            },
            [&](long at, long lo, long n) {
                if (rank != 0) memcpy(x + lo, slot(at, 0), n);
            });
    }
};
