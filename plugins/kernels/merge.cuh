// Merges what the warps of a crew have attended to: sums of values, weighted by exponentials of logits, each
// relative to a warp's own largest logit. In a fixed order, whichever blocks the warps belong to.
#pragma once

#include "crew.cuh"

namespace fasa {

constexpr int kHeads = 8;        // query heads at most
constexpr int kMergedHeads = 4;  // query heads merged at a time, to bound shared memory

// What WARPS warps leave to be merged. `partial`: of two dims and two heads, as a lane holds them; padded so
// that neither lanes of a warp nor four warps meet in a bank.
template <int HEAD_DIM, int WARPS>
struct AttendScratch {
    static constexpr int kSlots = kWarp / 4 * (kMergedHeads / 2);     // lanes that have one of the heads
    static constexpr int kItems = (HEAD_DIM + 63) / 64 * 4 * kSlots;  // of each, 4 in 64 dims
    float largest[WARPS][kHeads];
    float total[WARPS][kHeads];
    float4 partial[WARPS][kItems + 2];
    Mailbox mailbox;  // in a cluster's first block

    // What the warps of a cluster's other blocks send.
    static __host__ __device__ constexpr uint32_t sent(int peers) {
        return (WARPS - WARPS / peers) * (sizeof(float4) * kItems + 2 * sizeof(float) * kHeads);
    }
};

// Where they leave their result for `group` query heads: in `out`, or, to be merged with others, in
// `partial`.
template <typename T>
struct Attended {
    T* out;          // [group, HEAD_DIM], where `partial` is NULL
    float* partial;  // the same in float32
    float* lse;      // [group] with `partial`: log2 of the sum of exponentials
};

// Two neighbouring elements of a result.
template <typename T>
__device__ inline void store_pair(const Attended<T>& result, int at, float x, float y) {
    if (result.partial != nullptr) {
        *reinterpret_cast<float2*>(result.partial + at) = {x, y};
    } else {
        *reinterpret_cast<typename Vec2<T>::type*>(result.out + at) = {from_float<T>(x), from_float<T>(y)};
    }
}

// A lane's sums of a head_dim: of dims h * 64 + lane / 4 * 8 + 2 m and the next, of heads 2 * (lane % 4) and
// the next.
template <int HEAD_DIM>
using LaneSums = float[(HEAD_DIM + 63) / 64][4][4];

// Behind this the scratch of a merge can be used again.
template <int HEAD_DIM, int WARPS>
__device__ inline void next_merge(const Crew<WARPS>& crew, AttendScratch<HEAD_DIM, WARPS>& scratch) {
    if (crew.peers > 1 && crew.merges() && threadIdx.x == 0) {
        scratch.mailbox.reopen(scratch.sent(crew.peers));
    }
    crew.sync();
}

// Leaves a warp's results for the heads from `first` on where the first block merges them. largest, total: as
// merge_warps() has them.
template <int HEAD_DIM, int WARPS>
__device__ inline void leave_results(const Crew<WARPS>& crew, AttendScratch<HEAD_DIM, WARPS>& scratch,
                                     float largest, float total, const LaneSums<HEAD_DIM>& acc, int first) {
    using Scratch = AttendScratch<HEAD_DIM, WARPS>;
    constexpr int kSlots = Scratch::kSlots, kSums = Scratch::kItems / kSlots;
    const int quad = threadIdx.x % kWarp / 4, within = threadIdx.x % 4, warp = crew.number();
    const int pair = within - first / 2;  // of the heads that are merged now
    const bool has_pair = pair >= 0 && pair < kMergedHeads / 2;
    float4* partial = &scratch.partial[warp][quad * (kMergedHeads / 2) + pair];
    const auto sum_of = [&](int i) {
        const auto& sum = acc[i / 4][i % 4];
        return float4{sum[0], sum[1], sum[2], sum[3]};
    };
    if (crew.merges()) {
        if (within == 0) {
            scratch.largest[warp][quad] = largest;
            scratch.total[warp][quad] = total;
        }
        if (has_pair) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                partial[i * kSlots] = sum_of(i);
            }
        }
        return;
    }
    const uint32_t barrier = in_first_block(&scratch.mailbox.barrier);
    if (within == 0) {
        send(in_first_block(&scratch.largest[warp][quad]), largest, barrier);
        send(in_first_block(&scratch.total[warp][quad]), total, barrier);
    }
    if (has_pair) {
        const uint32_t to = in_first_block(partial);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            send(to + i * kSlots * sizeof(float4), sum_of(i), barrier);
        }
    }
}

// largest, total: of head lane / 4, in powers of two, on the four lanes that have it; `group` heads are
// there. `result_at` gives an Attended<T>, when it is time, for registers are short. Calls need
// next_merge() between them.
template <typename T, int HEAD_DIM, int WARPS, typename ResultAt>
__device__ inline void merge_warps(const Crew<WARPS>& crew, AttendScratch<HEAD_DIM, WARPS>& scratch,
                                   float largest, float total, const LaneSums<HEAD_DIM>& acc, int group,
                                   const ResultAt& result_at) {
    using Scratch = AttendScratch<HEAD_DIM, WARPS>;
    const Attended<T> result = result_at();
    constexpr int kSlots = Scratch::kSlots, kItems = Scratch::kItems;
    constexpr int kParts = 4;  // threads an item, each for a quarter of the warps
    constexpr int kAtOnce = Crew<WARPS>::kThreads / kParts, kShare = WARPS / kParts;
    static_assert(kAtOnce % kSlots == 0);
    const int part = crew.thread() % kParts, slot = crew.thread() / kParts % kSlots;
#pragma unroll
    for (int first = 0; first < kHeads; first += kMergedHeads) {
        if (first >= group) {
            break;
        }
        if (first > 0) {
            next_merge(crew, scratch);
        }
        if (crew.attends()) {
            leave_results(crew, scratch, largest, total, acc, first);
        }
        if (!crew.merges()) {
            continue;
        }
        if (crew.peers > 1 && crew.thread() < kWarp) {
            scratch.mailbox.wait();
        }
        crew.sync_block();
        // Of two heads: the largest logit, and what a warp's results are multiplied by.
        const int pair_head = first + slot % (kMergedHeads / 2) * 2;
        float2 factor[kShare], peak = {-INFINITY, -INFINITY};
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            factor[i] = reinterpret_cast<const float2&>(scratch.largest[part + i * kParts][pair_head]);
            peak = {fmaxf(peak.x, factor[i].x), fmaxf(peak.y, factor[i].y)};
        }
#pragma unroll
        for (int step = 1; step < kParts; step *= 2) {
            peak.x = fmaxf(peak.x, __shfl_xor_sync(0xffffffff, peak.x, step));
            peak.y = fmaxf(peak.y, __shfl_xor_sync(0xffffffff, peak.y, step));
        }
        // Where no logit is above minus infinity all weights are 0, or NaN.
        peak = {peak.x == -INFINITY ? 0.f : peak.x, peak.y == -INFINITY ? 0.f : peak.y};
        float2 norm = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            factor[i] = {exp2f(factor[i].x - peak.x), exp2f(factor[i].y - peak.y)};
            const float2 weights =
                reinterpret_cast<const float2&>(scratch.total[part + i * kParts][pair_head]);
            norm.x += weights.x * factor[i].x, norm.y += weights.y * factor[i].y;
        }
        norm = {sum_of_four(norm.x), sum_of_four(norm.y)};
        for (int item = crew.thread() / kParts; item < kItems; item += kAtOnce) {
            float4 sum = {0.f, 0.f, 0.f, 0.f};  // (head, dim), (next head, dim), the same for the next dim
#pragma unroll
            for (int i = 0; i < kShare; ++i) {
                const float4 other = scratch.partial[part + i * kParts][item];
                sum.x += other.x * factor[i].x, sum.y += other.y * factor[i].y;
                sum.z += other.z * factor[i].x, sum.w += other.w * factor[i].y;
            }
            sum = {sum_of_four(sum.x), sum_of_four(sum.y), sum_of_four(sum.z), sum_of_four(sum.w)};
            const int i = item / kSlots, dim = i / 4 * 64 + slot / (kMergedHeads / 2) * 8 + i % 4 * 2;
            const int head = pair_head + part;  // two of the threads store
            if (part < 2 && head < group && dim < HEAD_DIM) {
                const float total_weight = part == 0 ? norm.x : norm.y, inverse = 1.f / total_weight;
                store_pair(result, head * HEAD_DIM + dim, (part == 0 ? sum.x : sum.y) * inverse,
                           (part == 0 ? sum.z : sum.w) * inverse);
                if (result.partial != nullptr && dim == 0) {
                    result.lse[head] = (part == 0 ? peak.x : peak.y) + log2f(total_weight);
                }
            }
        }
    }
}

}  // namespace fasa
