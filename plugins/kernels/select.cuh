// Exact top-k of one row of keys by one block of threads.
//
// Idea: the score pass leaves the maximum of every eight keys (an octet), and each thread folds the maxima it
// holds into one. The budget-th largest of these folded maxima, by a histogram, bounds the budget-th largest
// key from below; little more than `budget` octets reach that bound and are listed, one for each thread.
// Another histogram, of their keys from the bound on, tells the exact threshold. So a row of 128k tokens is
// read once, an eighth of it. Histograms count, so the order of their atomics does not show. Tokens that tie
// at the threshold, at 16 bits, are scored again in float32, and ties there go to the lower position. Masses
// of equal scores take the slow path of select_slowly.cuh.
#pragma once

#include "rescore.cuh"
#include "threshold.cuh"

namespace fasa {

constexpr int kMaxTies = 1024;  // at the threshold

struct alignas(16) SelectScratch {
    Histogram maxima;
    ThresholdScratch threshold;
    int token[kMaxTies];       // of ties
    int32_t offset[kMaxTies];  // of their blocks of keys
    uint64_t order[kMaxTies];  // the best is the largest

    // What select_tokens() needs; can be done before the scores are there, but for a barrier.
    __device__ void prepare(const Scores& scores, int64_t row, int length) {
        maxima.clear();
        threshold.clear();
        // The last octets' maxima are read by eight.
        const int octets = octets_of(length);
        if (threadIdx.x < (-octets & 7)) {
            scores.maxima[row * scores.octets + octets + threadIdx.x] = kHidden;
        }
    }
};

// Writes the best `wanted` of the `ties` tokens in scratch.token to `chosen`.
template <typename T>
__device__ void break_ties(SelectScratch& scratch, int ties, int wanted, const Rescorer<T>& rescore,
                           int* chosen) {
    for (int t = threadIdx.x / kWarp; t < ties; t += kSelectWarps) {
        const int token = scratch.token[t];
        const float score = rescore(token, scratch.offset[t]);
        if (threadIdx.x % kWarp == 0) {  // of equal scores, the lower token's is the larger
            scratch.order[t] = static_cast<uint64_t>(float_rank(score)) << 32 | ~static_cast<uint32_t>(token);
        }
    }
    __syncthreads();
    for (int t = threadIdx.x; t < ties; t += kSelectThreads) {
        const uint64_t mine = scratch.order[t];
        int better = 0;
#pragma unroll 4
        for (int other = 0; other < ties; ++other) {
            better += scratch.order[other] > mine;
        }
        if (better < wanted) {
            chosen[better] = static_cast<int>(~static_cast<uint32_t>(mine));
        }
    }
    __syncthreads();
}

// Writes the `budget` tokens of a row with length > budget to `chosen` (shared memory), in a fixed order, or
// returns false: too many scores are equal, and select_slowly() has to do it.
// octet_list: shared memory of octet_capacity(budget) ints. After scratch.prepare() and a barrier.
template <typename T>
__device__ bool select_tokens(const Scores& scores, const fasa_decode_params& p, int64_t row, int length,
                              const Rescorer<T>& rescore, SelectScratch& scratch, int* octet_list,
                              int* chosen) {
    int turn = 0;
    ThresholdScratch& counted = scratch.threshold;
    int listed = octets_of(length);
    const bool all = listed <= octet_capacity(p.budget);
    uint32_t floor = kLowest;
    if (!all) {
        const Candidates candidates(scores, row, listed);
        listed =
            candidates.list(p.budget, octet_list, scratch.maxima, counted.block, counted.found, turn, floor);
        __syncthreads();
    }
    if (listed > octet_capacity(p.budget)) {
        return false;
    }
    const Octets octets(scores, p.pool, rescore.seq, row, all ? nullptr : octet_list, listed);
    Threshold threshold{};
    if (all || !near_threshold(threshold, octets, floor, p.budget, counted, turn)) {
        if (!all) {
            counted.keys.clear();
            __syncthreads();
        }
        threshold = any_threshold(octets, floor, p.budget, counted, turn);
    }
    const int wanted = p.budget - threshold.above;
    if (threshold.ties > kMaxTies) {
        return false;
    }
    constexpr int kPacked = 19;
    int mine = 0, total;  // keys above the threshold << kPacked | keys at it
    octets.each([&](const uint4& eight, int) {
        mine += __popc(threshold.above_in(eight)) << kPacked | __popc(threshold.ties_in(eight));
    });
    const int before = block_scan(counted.block, turn, mine, &total);
    if (mine) {
        int* above_to = chosen + (before >> kPacked);
        int* ties_to = threshold.ties == wanted ? chosen + threshold.above : scratch.token;
        int tie = before & ((1 << kPacked) - 1);
        octets.each([&](const uint4& eight, int i) {
            const int first = octets.number(i) * kOctet;
            append_bits(above_to, threshold.above_in(eight), first);
            for (uint32_t hit = threshold.ties_in(eight); hit; hit &= hit - 1) {
                ties_to[tie] = first + __ffs(hit) - 1;
                scratch.offset[tie++] =
                    i < kSelectThreads ? octets.kept_offset : key_offset(p.pool, rescore.seq, first);
            }
        });
    }
    __syncthreads();
    if (threshold.ties > wanted) {
        break_ties(scratch, threshold.ties, wanted, rescore, chosen + threshold.above);
    }
    return true;
}

}  // namespace fasa
