// Exact top-k of one row of keys by one block of threads.
//
// Idea: the score pass leaves the maximum of every eight keys (an octet), and each thread folds the maxima it
// holds into one. The budget-th largest of these folded maxima, by a histogram, bounds the budget-th largest
// key from below; little more than `budget` octets reach that bound and are listed, one for each thread.
// Their keys, by another histogram, give the bin (3 % of a score wide) in which the exact threshold lies, and
// those of the bin, by a third one, the threshold. So a row of 128k tokens is read once, an eighth of it.
// Histograms count, so the order of their atomics does not show. Tokens that tie at the threshold, at 16
// bits, are scored again in float32, and ties there go to the lower position. Masses of equal scores take the
// slow path of select_slowly.cuh.
#pragma once

#include "candidates.cuh"
#include "rescore.cuh"

namespace fasa {

constexpr int kMaxTies = 1024;  // at the threshold

struct alignas(16) SelectScratch {
    Histogram maxima, keys;
    BlockScratch block;
    Bin found;
    int in_bin[1 << Histogram::kShift];  // keys, by rank
    int token[kMaxTies];
    float score[kMaxTies];
};

// Which of the keys of an octet lie above a range of ranks, and which in it.
struct RankRange {
    uint32_t lowest, beyond;

    __device__ uint32_t above(const uint4& eight) const { return hits(eight, twice(rank_key(beyond))); }
    __device__ uint32_t within(const uint4& eight) const {
        return hits(eight, twice(rank_key(lowest))) & ~above(eight);
    }
};

// Writes the best `wanted` of the `ties` tokens in scratch.token to `chosen`.
template <typename T>
__device__ void break_ties(SelectScratch& scratch, int ties, int wanted, const Rescorer<T>& rescore,
                           int* chosen) {
    for (int t = threadIdx.x / kWarp; t < ties; t += kSelectWarps) {
        const float score = rescore(scratch.token[t]);
        if (threadIdx.x % kWarp == 0) {
            scratch.score[t] = score;
        }
    }
    __syncthreads();
    for (int t = threadIdx.x; t < ties; t += kSelectThreads) {
        const float score = scratch.score[t];
        const int token = scratch.token[t];
        int better = 0;
        for (int other = 0; other < ties; ++other) {
            better += scratch.score[other] > score ||
                      (scratch.score[other] == score && scratch.token[other] < token);
        }
        if (better < wanted) {
            chosen[better] = token;
        }
    }
    __syncthreads();
}

// What select_tokens() needs; can be done before the scores are there.
__device__ inline void prepare(SelectScratch& scratch) {
    scratch.maxima.clear();
    scratch.keys.clear();
    if (threadIdx.x < sizeof(scratch.in_bin) / sizeof(int)) {
        scratch.in_bin[threadIdx.x] = 0;
    }
}

// Writes the `budget` tokens of a row with length > budget to `chosen` (shared memory), in a fixed order, or
// returns false: too many scores are equal, and select_slowly() has to do it.
// octet_list: shared memory of octet_capacity(budget) ints. After prepare().
template <typename T>
__device__ bool select_tokens(const Scores& scores, const fasa_decode_params& p, int64_t row, int length,
                              const Rescorer<T>& rescore, SelectScratch& scratch, int* octet_list,
                              int* chosen) {
    int turn = 0;
    const auto* keys = reinterpret_cast<const uint4*>(scores.keys) + row * scores.octets;
    const int octets = (length + kOctet - 1) / kOctet;
    const bool all = octets <= octet_capacity(p.budget);
    int listed = octets;
    uint32_t floor = kLowest;
    if (!all) {
        Candidates candidates(scores, row, octets);
        __syncthreads();
        listed =
            candidates.list(p.budget, octet_list, scratch.maxima, scratch.block, scratch.found, turn, floor);
    }
    __syncthreads();
    // Thread t looks at every kSelectThreads-th listed octet; it keeps the keys of its first.
    const auto octet_at = [&](int i) { return all ? i : octet_list[i]; };
    uint4 kept = hidden_octet();
    if (threadIdx.x < listed && listed <= octet_capacity(p.budget)) {
        kept = keys[octet_at(threadIdx.x)];
    }
    const auto each = [&](auto visit) {
        if (threadIdx.x < listed) {
            visit(kept, threadIdx.x);
        }
#pragma unroll 1
        for (int i = threadIdx.x + kSelectThreads; i < listed; i += kSelectThreads) {
            visit(keys[octet_at(i)], i);
        }
    };
    if (listed > octet_capacity(p.budget)) {
        return false;
    }
    each([&](const uint4& eight, int) {
        const uint32_t hit = hits(eight, twice(floor));
#pragma unroll
        for (int slot = 0; slot < kOctet; ++slot) {
            if (hit >> slot & 1) {
                scratch.keys.add(octet_key(eight, slot));
            }
        }
    });
    __syncthreads();
    Bin bin = locate(scratch.keys, p.budget, scratch.block, turn, scratch.found);
    RankRange range;
    range.lowest = static_cast<uint32_t>(bin.index) << Histogram::kShift;
    range.beyond = range.lowest + (1 << Histogram::kShift);
    each([&](const uint4& eight, int) {
        for (uint32_t hit = range.within(eight); hit; hit &= hit - 1) {
            atomicAdd(&scratch.in_bin[key_rank(octet_key(eight, __ffs(hit) - 1)) - range.lowest], 1);
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
    const int at = __ffs(__ballot_sync(0xffffffff, bin.above + reached >= p.budget)) - 1;
    const int ties = scratch.in_bin[kWarp - 1 - at];
    const int above = bin.above + __shfl_sync(0xffffffff, reached, at) - ties, wanted = p.budget - above;
    if (ties > kMaxTies) {
        return false;
    }
    range.lowest += kWarp - 1 - at;
    range.beyond = range.lowest + 1;
    constexpr int kPacked = 19;
    int mine = 0, total;  // keys above the threshold << kPacked | keys at it
    each([&](const uint4& eight, int) {
        mine += __popc(range.above(eight)) << kPacked | __popc(range.within(eight));
    });
    const int before = block_scan(scratch.block, turn, mine, &total);
    if (mine) {
        int* above_to = chosen + (before >> kPacked);
        int* tie_to = (ties == wanted ? chosen + above : scratch.token) + (before & ((1 << kPacked) - 1));
        each([&](const uint4& eight, int i) {
            const uint32_t above = range.above(eight), within = range.within(eight);
            const int first = octet_at(i) * kOctet;
#pragma unroll
            for (int slot = 0; slot < kOctet; ++slot) {
                if (above >> slot & 1) {
                    *above_to++ = first + slot;
                } else if (within >> slot & 1) {
                    *tie_to++ = first + slot;
                }
            }
        });
    }
    __syncthreads();
    if (ties > wanted) {
        break_ties(scratch, ties, wanted, rescore, chosen + above);
    }
    return true;
}

}  // namespace fasa
