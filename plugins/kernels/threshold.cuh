// The key that decides which tokens are chosen, from the octets that may hold them.
#pragma once

#include "candidates.cuh"

namespace fasa {

// Octets of a row: thread t looks at every kSelectThreads-th of them. It keeps the keys of its first, which
// nearly always is its only one, and the offset of that octet's block of keys.
struct Octets {
    const uint4* keys;  // of the row
    const int* list;    // NULL: all of the row
    int count;
    uint4 kept;
    int32_t kept_offset;

    __device__ Octets(const Scores& scores, const fasa_pool& pool, int seq, int64_t row, const int* list,
                      int count)
        : keys(reinterpret_cast<const uint4*>(scores.keys) + row * scores.octets),
          list(list),
          count(count),
          kept(hidden_octet()),
          kept_offset(0) {
        if (threadIdx.x < count) {
            kept = keys[number(threadIdx.x)];
            kept_offset = key_offset(pool, seq, number(threadIdx.x) * kOctet);
        }
    }
    __device__ int number(int i) const { return list == nullptr ? i : list[i]; }
    template <typename Visit>
    __device__ void each(Visit visit) const {
        if (threadIdx.x < count) {
            visit(kept, threadIdx.x);
        }
#pragma unroll 1
        for (int i = threadIdx.x + kSelectThreads; i < count; i += kSelectThreads) {
            visit(keys[number(i)], i);
        }
    }
};

// Of the lowest chosen key: all above it are chosen, too, and of those at it as many as there is room for.
struct Threshold {
    uint32_t rank;
    int above, ties;  // keys above it, keys at it

    // Which of the keys of an octet lie above it, and which at it.
    __device__ uint32_t above_in(const uint4& eight) const { return hits_from(eight, rank + 1); }
    __device__ uint32_t ties_in(const uint4& eight) const {
        return hits_from(eight, rank) & ~above_in(eight);
    }
};

struct ThresholdScratch {
    Histogram keys;
    int in_bin[1 << Histogram::kShift];  // keys, by rank
    BlockScratch block;
    Bin found;

    __device__ void clear() {
        keys.clear();
        if (threadIdx.x < sizeof(in_bin) / sizeof(int)) {
            in_bin[threadIdx.x] = 0;
        }
    }
};

// Counts the keys from `floor` on; bin_of: of a rank.
template <typename BinOf>
__device__ inline void count_keys(const Octets& octets, uint32_t floor, ThresholdScratch& scratch,
                                  const BinOf& bin_of) {
    octets.each([&](const uint4& eight, int) {
        const uint32_t hit = hits(eight, twice(floor));
#pragma unroll
        for (int slot = 0; slot < kOctet; ++slot) {
            if (hit >> slot & 1) {
                scratch.keys.add(bin_of(key_rank(octet_key(eight, slot))));
            }
        }
    });
    __syncthreads();
}

// With a bin for each rank from the floor's on: two octaves, in which the threshold nearly always lies. False
// where it does not. `scratch` is clear.
__device__ inline bool near_threshold(Threshold& threshold, const Octets& octets, uint32_t floor, int budget,
                                      ThresholdScratch& scratch, int& turn) {
    const uint32_t lowest = key_rank(floor);
    count_keys(octets, floor, scratch,
               [&](uint32_t rank) { return min(rank - lowest, Histogram::kBins - 1); });
    const Bin bin = locate(scratch.keys, budget, scratch.block, turn, scratch.found);
    threshold = {lowest + bin.index, bin.above, bin.count};
    return bin.index < Histogram::kBins - 1;
}

// Wherever it lies: first the bin of many ranks, then the rank. `scratch` is clear.
__device__ inline Threshold any_threshold(const Octets& octets, uint32_t floor, int budget,
                                          ThresholdScratch& scratch, int& turn) {
    count_keys(octets, floor, scratch, [](uint32_t rank) { return rank >> Histogram::kShift; });
    const Bin bin = locate(scratch.keys, budget, scratch.block, turn, scratch.found);
    const uint32_t lowest = static_cast<uint32_t>(bin.index) << Histogram::kShift;
    octets.each([&](const uint4& eight, int) {
        const uint32_t beyond = hits_from(eight, lowest + (1 << Histogram::kShift));
        for (uint32_t hit = hits_from(eight, lowest) & ~beyond; hit; hit &= hit - 1) {
            atomicAdd(&scratch.in_bin[key_rank(octet_key(eight, __ffs(hit) - 1)) - lowest], 1);
        }
    });
    __syncthreads();
    static_assert(1 << Histogram::kShift == kWarp);
    const int lane = threadIdx.x % kWarp;
    int reached = scratch.in_bin[kWarp - 1 - lane];  // lane 0 has the highest rank
    for (int step = 1; step < kWarp; step *= 2) {
        const int higher = __shfl_up_sync(0xffffffff, reached, step);
        reached += lane >= step ? higher : 0;
    }
    const int at = __ffs(__ballot_sync(0xffffffff, bin.above + reached >= budget)) - 1;
    const int ties = scratch.in_bin[kWarp - 1 - at];
    return {lowest + kWarp - 1 - at, bin.above + __shfl_sync(0xffffffff, reached, at) - ties, ties};
}

}  // namespace fasa
