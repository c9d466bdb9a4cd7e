// Counting, scanning and searching by a whole block of threads.
#pragma once

#include "common.cuh"

namespace fasa {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / kWarp;

// Shared scratch of the functions below, a value for each warp. Two turns, so that one barrier a call is
// enough.
struct BlockScratch {
    int sums[2][kSelectWarps];
    unsigned pairs[2][kSelectWarps];
};

// The sum of `mine` over the block, on every thread. `turn` alternates between calls.
__device__ inline int block_sum(BlockScratch& scratch, int& turn, int mine) {
    const int lane = threadIdx.x % kWarp;
    const int sum = __reduce_add_sync(0xffffffff, mine);
    if (lane == 0) {
        scratch.sums[turn][threadIdx.x / kWarp] = sum;
    }
    __syncthreads();
    const int total = __reduce_add_sync(0xffffffff, lane < kSelectWarps ? scratch.sums[turn][lane] : 0);
    turn ^= 1;
    return total;
}

// Three sums for one barrier. A warp's y and z stay below 2^16: 32 threads of at most 2047.
__device__ inline int3 block_sum(BlockScratch& scratch, int& turn, int3 mine) {
    const int lane = threadIdx.x % kWarp;
    const int x = __reduce_add_sync(0xffffffff, mine.x);
    const unsigned yz = __reduce_add_sync(0xffffffff, static_cast<unsigned>(mine.y | mine.z << 16));
    if (lane == 0) {
        scratch.sums[turn][threadIdx.x / kWarp] = x;
        scratch.pairs[turn][threadIdx.x / kWarp] = yz;
    }
    __syncthreads();
    const bool mine_to_add = lane < kSelectWarps;
    const unsigned pair = mine_to_add ? scratch.pairs[turn][lane] : 0;
    const int3 total{__reduce_add_sync(0xffffffff, mine_to_add ? scratch.sums[turn][lane] : 0),
                     static_cast<int>(__reduce_add_sync(0xffffffff, pair & 0xffff)),
                     static_cast<int>(__reduce_add_sync(0xffffffff, pair >> 16))};
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
    const int sum = lane < kSelectWarps ? scratch.sums[turn][lane] : 0;
    const int before = __reduce_add_sync(0xffffffff, lane < warp ? sum : 0);
    *total = __reduce_add_sync(0xffffffff, sum);
    turn ^= 1;
    return before + inclusive - mine;
}

// Adds to each half of `count` how many of its keys of the pair are at least `bound`, given twice. No
// overflow: a thread holds far fewer than 2048.
__device__ inline void count_pairs(__half2& count, const uint4& keys, __half2 bound) {
    const uint32_t words[4] = {keys.x, keys.y, keys.z, keys.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        __half2 pair;
        *reinterpret_cast<uint32_t*>(&pair) = words[i];
        count = __hadd2(count, __hge2(pair, bound));
    }
}

__device__ inline __half2 twice(uint32_t key) {
    return __half2half2(__ushort_as_half(static_cast<uint16_t>(key)));
}

__device__ inline int total_of(__half2 count) {
    return static_cast<int>(__low2float(count) + __high2float(count));
}

// A bit for each of the eight keys that is at least `bound`, given twice.
__device__ inline uint32_t hits(const uint4& keys, __half2 bound) {
    const uint32_t words[4] = {keys.x, keys.y, keys.z, keys.w};
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        __half2 pair;
        *reinterpret_cast<uint32_t*>(&pair) = words[i];
        mask |= (__hge2_mask(pair, bound) & 0x00020001u << 2 * i) << 0;
    }
    return (mask & 0xff) | mask >> 16;
}

// The eight keys as if none of their tokens existed.
__device__ inline uint4 hidden_octet() {
    constexpr uint32_t pair = kHidden | kHidden << 16;
    return {pair, pair, pair, pair};
}

struct Threshold {
    uint32_t rank;  // at least `wanted` keys have this rank or a higher one
    int reached;    // how many do
};

// The largest rank that at least `wanted` keys reach, or an earlier one that at most `enough` (>= wanted)
// keys reach. `count(rank)` says how many keys of the thread reach it; `reached` of them, all threads
// together, reach `low`.
template <typename Count>
__device__ inline Threshold search(BlockScratch& scratch, int& turn, int wanted, int enough, uint32_t low,
                                   int reached, Count count) {
    uint32_t high = 0x8000 | kForced;
    if (reached > enough) {  // forced tokens may be enough by themselves
        const int forced = block_sum(scratch, turn, count(high));
        if (forced >= wanted) {
            return {high, forced};
        }
    }
    while (high - low > 1 &&
           reached > enough) {  // three bounds at a time: a round costs little more than its barrier
        const uint32_t step = (high - low + 3) / 4;
        const uint32_t rank[3] = {low + step, min(low + 2 * step, high), min(low + 3 * step, high)};
        const int3 total = block_sum(scratch, turn, int3{count(rank[0]), count(rank[1]), count(rank[2])});
        if (total.z >= wanted && rank[2] < high) {
            low = rank[2], reached = total.z;
        } else if (total.y >= wanted && rank[1] < high) {
            low = rank[1], reached = total.y, high = rank[2];
        } else if (total.x >= wanted && rank[0] < high) {
            low = rank[0], reached = total.x, high = rank[1];
        } else {
            high = rank[0];
        }
    }
    return {low, reached};
}

}  // namespace fasa
