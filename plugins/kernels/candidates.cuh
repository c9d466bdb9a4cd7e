// The octets of a row that may hold chosen tokens: those whose maximum reaches a floor.
#pragma once

#include "block.cuh"

namespace fasa {

constexpr int kMaximaHeld = 4;  // uint4 of octet maxima that a thread keeps: 128k tokens a row

// Octets that the list holds, for a budget.
__host__ __device__ inline int octet_capacity(int budget) {
    return 2 * budget + kSelectThreads;
}

struct Candidates {
    const uint4* maxima;
    int octets;
    uint4 held[kMaximaHeld];

    // Thread t looks at every kSelectThreads-th uint4 of maxima, so that neighbours, which score alike, are
    // shared out.
    __device__ Candidates(const Scores& scores, int64_t row, int octets)
        : maxima(reinterpret_cast<const uint4*>(scores.maxima + row * scores.octets)), octets(octets) {
#pragma unroll
        for (int i = 0; i < kMaximaHeld; ++i) {
            held[i] = load(i);
        }
    }

    __device__ int index(int i) const { return threadIdx.x + i * kSelectThreads; }
    __device__ uint4 load(int i) const { return index(i) * 8 < octets ? maxima[index(i)] : hidden_octet(); }
    // Whether the warp has an i-th uint4: where there are fewer, it spares itself the instructions.
    __device__ bool has(int i) const {
        return (threadIdx.x / kWarp * kWarp + i * kSelectThreads) * 8 < octets;
    }
    template <typename Visit>
    __device__ void each(Visit visit) const {
#pragma unroll
        for (int i = 0; i < kMaximaHeld; ++i) {
            if (has(i)) {
                visit(held[i], i);
            }
        }
        for (int i = kMaximaHeld; index(i) * 8 < octets; ++i) {
            visit(load(i), i);
        }
    }

    static __device__ void add(Histogram& histogram, uint32_t key) {
        if (key != kHidden) {
            histogram.add(key_rank(key) >> Histogram::kShift);
        }
    }
    static __device__ void add(Histogram& histogram, const uint4& eight) {
#pragma unroll
        for (int slot = 0; slot < 8; ++slot) {
            add(histogram, octet_key(eight, slot));
        }
    }
    static __device__ uint32_t lowest_key(const Bin& bin) {
        return rank_key(max(static_cast<uint32_t>(bin.index) << Histogram::kShift, kAllRanks));
    }

    // The key of a floor that at least `budget` octets reach, by folded maxima; `histogram` is clear.
    __device__ uint32_t folded_floor(int budget, Histogram& histogram, BlockScratch& scratch, Bin& found,
                                     int& turn) const {
        const int groups = (octets + 7) / 8;  // of eight maxima
        const auto leaves_enough = [&](int values) { return 3 * values >= 4 * budget; };
        uint4 even = larger_octet(held[0], held[2]), odd = larger_octet(held[1], held[3]);
        for (int i = kMaximaHeld; index(i) < groups; i += 2) {
            even = larger_octet(even, load(i));
            odd = larger_octet(odd, load(i + 1));
        }
        const uint4 both = larger_octet(even, odd);
        if (leaves_enough(min(kSelectThreads, groups))) {
            const __half2 pair = __hmax2(__hmax2(as_half2(both.x), as_half2(both.y)),
                                         __hmax2(as_half2(both.z), as_half2(both.w)));
            add(histogram,
                static_cast<uint32_t>(__half_as_ushort(__hmax(__low2half(pair), __high2half(pair)))));
        } else if (leaves_enough(8 * min(kSelectThreads, groups))) {
            add(histogram, both);
        } else {
            add(histogram, even);
            add(histogram, odd);
        }
        __syncthreads();
        return lowest_key(locate(histogram, budget, scratch, turn, found));
    }

    // Lists the octets that reach a floor, in a fixed order, and returns how many there are; more than
    // octet_capacity: nothing is listed. More than octet_capacity octets exist, and `histogram` is clear.
    __device__ int list(int budget, int* octet_list, Histogram& histogram, BlockScratch& scratch, Bin& found,
                        int& turn, uint32_t& floor) const {
        floor = folded_floor(budget, histogram, scratch, found, turn);
        int listed, place = 0;
        const auto count = [&]() {
            int mine = 0;
            each([&](const uint4& eight, int) { mine += __popc(hits(eight, twice(floor))); });
            place = block_scan(scratch, turn, mine, &listed);
        };
        count();
        if (listed > octet_capacity(budget)) {
            // High scores crowd into the maxima of few threads, which leaves a floor that is far too low: all
            // maxima tell a better one.
            histogram.clear();
            __syncthreads();
            each([&](const uint4& eight, int) { add(histogram, eight); });
            __syncthreads();
            floor = lowest_key(locate(histogram, budget, scratch, turn, found));
            count();
        }
        if (listed <= octet_capacity(budget)) {
            each([&](const uint4& eight, int i) {
                for (uint32_t hit = hits(eight, twice(floor)); hit; hit &= hit - 1) {
                    octet_list[place++] = index(i) * 8 + __ffs(hit) - 1;
                }
            });
        }
        return listed;
    }
};

}  // namespace fasa
