// Exact top-k for rows whose candidates overflow shared memory: masses of equal scores. Every pass reads the
// row: first the 16-bit keys decide, then, in their place, the upper and the lower bits of the float32 scores
// of those that tie.
#pragma once

#include "block.cuh"
#include "rescore.cuh"

namespace fasa {

// Writes `budget` tokens to `chosen` (shared memory). By one block of threads: it overwrites the keys.
template <typename T>
__device__ __noinline__ void select_slowly(const Scores& scores, const fasa_decode_params& p, int64_t row,
                                           int length, Rescorer<T> rescore, BlockScratch& scratch,
                                           int* chosen) {
    int turn = 0;
    uint16_t* keys = scores.keys + row * scores.octets * kOctet;  // becomes ranks
    const auto count = [&](uint32_t bound) {                      // ranks that reach it, by all threads
        int n = 0;
        for (int t = threadIdx.x; t < length; t += kSelectThreads) {
            n += keys[t] >= bound;
        }
        return block_sum(scratch, turn, n);
    };
    const auto highest = [&]() {  // rank that at least `budget` tokens reach
        uint32_t low = 0, high = 0x10000;
        while (high - low > 1) {
            const uint32_t middle = low + (high - low) / 2;
            (count(middle) >= p.budget ? low : high) = middle;
        }
        return low;
    };
    // Those above `rank` are in, those below are out, and those at it go by `refined(token)`, 1..0xfffe.
    constexpr uint32_t kIn = 0xffff, kOut = 0;
    const auto refine = [&](uint32_t rank, auto refined) {
        for (int t = threadIdx.x / kWarp; t < length; t += kSelectWarps) {
            const uint32_t mine = keys[t];
            const uint32_t next = mine == rank ? refined(rescore(t)) : mine > rank ? kIn : kOut;
            __syncwarp();
            if (threadIdx.x % kWarp == 0) {
                keys[t] = static_cast<uint16_t>(next);
            }
        }
        __syncthreads();
    };
    for (int t = threadIdx.x; t < length; t += kSelectThreads) {
        keys[t] = static_cast<uint16_t>(key_rank(keys[t]));
    }
    __syncthreads();
    refine(highest(), [](float score) { return float_rank(score) >> 16; });
    refine(highest(), [](float score) { return 1 + (float_rank(score) >> 1 & 0x7fff); });
    const uint32_t rank = highest();
    const int spare = p.budget - count(rank + 1);
    int written = 0, at_bar = 0;
    for (int first = 0; first < length; first += kSelectThreads) {
        const int t = first + threadIdx.x;
        const uint32_t mine = t < length ? keys[t] : kOut;
        const bool tied = t < length && mine == rank;
        int total;
        const int before = at_bar + block_scan(scratch, turn, tied, &total);
        at_bar += total;
        const bool take = tied ? before < spare : mine > rank;
        const int place = written + block_scan(scratch, turn, take, &total);
        written += total;
        if (take) {
            chosen[place] = t;
        }
    }
    __syncthreads();
}

}  // namespace fasa
