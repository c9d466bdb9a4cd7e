// Counting, scanning and searching by a whole block of threads.
#pragma once

#include "common.cuh"

namespace fasa {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / kWarp;

// Shared scratch of the functions below. Two turns, so that one barrier a call is enough.
struct BlockScratch {
    int sums[2][kSelectWarps];
};

// The sum of `mine` over the block, on every thread. `turn` alternates between calls.
__device__ inline int block_sum(BlockScratch& scratch, int& turn, int mine) {
    const int sum = __reduce_add_sync(0xffffffff, mine);
    if (threadIdx.x % kWarp == 0) {
        scratch.sums[turn][threadIdx.x / kWarp] = sum;
    }
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) {
        total += scratch.sums[turn][w];
    }
    turn ^= 1;
    return total;
}

// The sum of `mine` over the threads before this one; `total` gets the sum over all.
__device__ inline int block_scan(BlockScratch& scratch, int& turn, int mine, int* total) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int inclusive = mine;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const int below = __shfl_up_sync(0xffffffff, inclusive, step);
        inclusive += lane >= step ? below : 0;
    }
    if (lane == kWarp - 1) {
        scratch.sums[turn][warp] = inclusive;
    }
    __syncthreads();
    int before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) {
        const int sum = scratch.sums[turn][w];
        before += w < warp ? sum : 0;
        all += sum;
    }
    turn ^= 1;
    *total = all;
    return before + inclusive - mine;
}

// Adds to each half of `count` how many of its keys of the pair are at least `bound`, given twice. No overflow: a thread
// holds far fewer than 2048.
__device__ inline void count_pairs(__half2& count, const uint4& keys, __half2 bound) {
    const uint32_t words[4] = {keys.x, keys.y, keys.z, keys.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        __half2 pair;
        *reinterpret_cast<uint32_t*>(&pair) = words[i];
        count = __hadd2(count, __hge2(pair, bound));
    }
}

__device__ inline __half2 twice(uint32_t key) { return __half2half2(__ushort_as_half(static_cast<uint16_t>(key))); }

__device__ inline int total_of(__half2 count) { return static_cast<int>(__low2float(count) + __high2float(count)); }

// The eight keys as if none of their tokens existed.
__device__ inline uint4 hidden_octet() {
    constexpr uint32_t pair = kHidden | kHidden << 16;
    return {pair, pair, pair, pair};
}

__device__ inline uint32_t key_of(const uint4& keys, int i) {
    const uint32_t word = i < 2 ? keys.x : i < 4 ? keys.y : i < 6 ? keys.z : keys.w;
    return i & 1 ? word >> 16 : word & 0xffff;
}

struct Threshold {
    uint32_t rank;  // at least `wanted` keys have this rank or a higher one
    int reached;    // how many do
};

// The largest rank that at least `wanted` keys reach, or an earlier one that at most `enough` (>= wanted) keys reach.
// `count(rank)` says how many keys of the thread reach it; `reached` of them, all threads together, reach `low`.
template <typename Count>
__device__ inline Threshold search(BlockScratch& scratch, int& turn, int wanted, int enough, uint32_t low, int reached,
                                   Count count) {
    uint32_t high = 0x8000 | kForced;
    if (reached > enough) {  // forced tokens may be enough by themselves
        const int forced = block_sum(scratch, turn, count(high));
        if (forced >= wanted) {
            return {high, forced};
        }
    }
    while (high - low > 1 && reached > enough) {
        const uint32_t middle = (low + high) / 2;
        const int total = block_sum(scratch, turn, count(middle));
        if (total >= wanted) {
            low = middle;
            reached = total;
        } else {
            high = middle;
        }
    }
    return {low, reached};
}

}  // namespace fasa
