// Counting, scanning and searching by a whole block of threads.
#pragma once

#include "common.cuh"

namespace fasa {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / kWarp;

// The sum over four neighbouring lanes, on each of them.
__device__ inline float sum_of_four(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Shared scratch of the functions below, a value for each warp. Two turns, so that one barrier a call is
// enough.
struct BlockScratch {
    int sums[2][kSelectWarps];
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

__device__ inline __half2 twice(uint32_t key) {
    return __half2half2(__ushort_as_half(static_cast<uint16_t>(key)));
}

// A bit for each of the eight keys that is at least `bound`, given twice.
__device__ inline uint32_t hits(const uint4& keys, __half2 bound) {
    const uint32_t mask = (__hge2_mask(as_half2(keys.x), bound) & 0x00020001u) |
                          (__hge2_mask(as_half2(keys.y), bound) & 0x00080004u) |
                          (__hge2_mask(as_half2(keys.z), bound) & 0x00200010u) |
                          (__hge2_mask(as_half2(keys.w), bound) & 0x00800040u);
    return (mask & 0xff) | mask >> 16;
}

// The same for ranks.
__device__ inline uint32_t hits_from(const uint4& keys, uint32_t rank) {
    return hits(keys, twice(rank_key(rank)));
}

// One of the eight keys.
__device__ inline uint32_t octet_key(const uint4& keys, int slot) {
    const uint32_t pair = slot < 4 ? (slot < 2 ? keys.x : keys.y) : (slot < 6 ? keys.z : keys.w);
    return slot & 1 ? pair >> 16 : pair & 0xffff;
}

// Appends the numbers of a mask's bits, from `first` on, to a list.
__device__ inline void append_bits(int*& list, uint32_t mask, int first) {
#pragma unroll
    for (int slot = 0; slot < 8; ++slot) {
        if (mask >> slot & 1) {
            *list++ = first + slot;
        }
    }
}

// The eight keys as if none of their tokens existed.
__device__ inline uint4 hidden_octet() {
    constexpr uint32_t pair = kHidden | kHidden << 16;
    return {pair, pair, pair, pair};
}

__device__ inline uint4 larger_octet(const uint4& a, const uint4& b) {
    return {larger_pair(a.x, b.x), larger_pair(a.y, b.y), larger_pair(a.z, b.z), larger_pair(a.w, b.w)};
}

constexpr uint32_t kAllRanks = 0x400;  // key_rank(kLowest): every token that exists

// How often keys occur; by the upper bits of their rank (bins of 3 % of a score), where not said otherwise.
struct Histogram {
    static constexpr int kShift = 5, kBins = 1 << (16 - kShift);
    static constexpr int kOwned = kBins / kSelectThreads;  // bins a thread
    static_assert(kOwned == 4);

    int4 bins[kSelectThreads];

    __device__ void clear() { bins[threadIdx.x] = {0, 0, 0, 0}; }
    __device__ void add(uint32_t bin) { atomicAdd(reinterpret_cast<int*>(bins) + bin, 1); }
};

struct Bin {
    int index;
    int above, count;  // keys in higher bins, keys in this one
};

// The highest bin such that `wanted` keys, which exist, lie in it and above; after a barrier.
__device__ inline Bin locate(const Histogram& histogram, int wanted, BlockScratch& scratch, int& turn,
                             Bin& shared) {
    const int top = kSelectThreads - 1 - threadIdx.x;  // the first thread owns the highest bins
    const int4 mine = histogram.bins[top];
    int total;
    int above = block_scan(scratch, turn, mine.x + mine.y + mine.z + mine.w, &total);
    const int count[4] = {mine.w, mine.z, mine.y, mine.x};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (above < wanted && above + count[i] >= wanted) {
            shared = {4 * top + 3 - i, above, count[i]};
        }
        above += count[i];
    }
    __syncthreads();
    return shared;
}

}  // namespace fasa
