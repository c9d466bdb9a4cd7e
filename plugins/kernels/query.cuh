// Queries over the label dims: one slot for each group (their sum) or for each head, and what scores become
// keys by.
#pragma once

#include "labels.cuh"

namespace fasa {

constexpr int kScoreThreads = 256;
constexpr int kScoreWarps = kScoreThreads / kWarp;

__host__ __device__ inline bool by_softmax(fasa_reduction reduction) {
    return reduction == FASA_REDUCE_MEAN_SOFTMAX || reduction == FASA_REDUCE_MAX_SOFTMAX ||
           reduction == FASA_REDUCE_SAMPLED_SOFTMAX;
}

// The factor on logits: softmax reductions work with powers of two.
__host__ __device__ inline float logit_factor(const fasa_decode_params& p) {
    return by_softmax(p.reduction) ? p.scale * kLog2e : p.scale;
}

template <typename T2>
__device__ inline float2 both(uint32_t word) {
    const T2 two = *reinterpret_cast<const T2*>(&word);
    return {to_float(two.x), to_float(two.y)};
}

// A lane's share of the query of a slot over its label dims: `heads` heads from `first` on, summed in their
// order. Pair r of lane l are the dims 2 (32 r + l) and the next one. One warp works together. It lies in
// registers, so that the loads can be under way while something else is asked for.
struct QueryShare {
    static constexpr int kPairs = kLabelDims / (2 * kWarp);
    float2 pair[kPairs];

    __device__ QueryShare(const fasa_decode_params& p, int seq, int first, int heads) : pair{} {
        constexpr int kAtOnce = 4;
        const int row = p.pool.head_dim / 2, lane = threadIdx.x % kWarp;
        const auto* words = static_cast<const uint32_t*>(p.q) +
                            (static_cast<int64_t>(seq) * p.num_q_heads + first) * row + lane;
        for (int head = 0; head < heads; head += kAtOnce) {
            uint32_t word[kAtOnce][kPairs];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
                for (int r = 0; r < kPairs; ++r) {
                    const bool there = head + i < heads && r * kWarp + lane < p.labels.n_tip;
                    word[i][r] = there ? words[(head + i) * row + r * kWarp] : 0;
                }
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
                for (int r = 0; r < kPairs; ++r) {
                    const float2 two = p.pool.dtype == FASA_FLOAT16 ? both<__half2>(word[i][r])
                                                                    : both<__nv_bfloat162>(word[i][r]);
                    pair[r].x += two.x, pair[r].y += two.y;
                }
            }
        }
    }

    // To shared memory of 2 * n_tip floats.
    __device__ void store(float* out, int n_tip) const {
#pragma unroll
        for (int r = 0; r < kPairs; ++r) {
            const int chunk = r * kWarp + threadIdx.x % kWarp;
            if (chunk < n_tip) {
                out[2 * chunk] = pair[r].x, out[2 * chunk + 1] = pair[r].y;
            }
        }
        __syncwarp();
    }
};

// Replaces `query` (n floats in shared memory) by its int8 codes; one warp. Returns the scale.
__device__ inline float quantise_query(float* query, int n) {
    const float scale = fmaxf(largest_magnitude(query, n), 1e-20f) / 127.f;
    for (int d = threadIdx.x % kWarp; d < n; d += kWarp) {
        query[d] = static_cast<float>(max(-127, min(127, __float2int_rn(query[d] / scale))));
    }
    __syncwarp();
    return scale;
}

// 2^x; zero where that is not a normal number.
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Several heads' softmaxed logits as one score, in powers of two: log2 of their sum, or their maximum. NaN
// logits count for nothing.
struct SoftmaxScore {
    float sum, peak;

    __device__ explicit SoftmaxScore(float sum = 0.f, float peak = -INFINITY) : sum(sum), peak(peak) {}

    __device__ void add(float logit, float normaliser) {
        const float power = fmaxf(logit - normaliser, -INFINITY);  // of NaN: the other
        peak = fmaxf(peak, power);
        sum += power_of_two(power);
    }
    __device__ float value(fasa_reduction reduction) const {
        // Sums that (nearly) vanish, or overflow, are told apart by their largest part.
        return reduction != FASA_REDUCE_MAX_SOFTMAX && sum > 1e-30f && sum < 1e38f ? __log2f(sum) : peak;
    }
};

// The sum of powers of two of the logits seen so far, relative to one of them; NaN counts for nothing,
// infinity as kLargest.
struct Normaliser {
    static constexpr float kLargest = 1e30f;
    static constexpr float kSlack = 16.f;  // a larger logit becomes the base only where sums might get large

    float base = -kLargest, sum = 0.f;

    template <int N>
    __device__ void add(const float (&logit)[N]) {
        float x[N], top = -INFINITY;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = fminf(fmaxf(logit[i], -INFINITY), kLargest);  // of NaN: the other
            top = fmaxf(top, x[i]);
        }
        if (top > base + kSlack) {
            sum *= power_of_two(base - top);
            base = top;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            sum += power_of_two(x[i] - base);
        }
    }
    // Adds what the lanes saw that differ in the bits first_step to last_step.
    __device__ void merge_lanes(int first_step, int last_step) {
        for (int step = first_step; step <= last_step; step *= 2) {
            const float other = __shfl_xor_sync(0xffffffff, base, step), top = fmaxf(base, other);
            sum = sum * power_of_two(base - top) +
                  __shfl_xor_sync(0xffffffff, sum, step) * power_of_two(other - top);
            base = top;
        }
    }
    __device__ float log2_sum() const { return base + log2f(fmaxf(sum, 1e-37f)); }
};

// log2 of the mean power of two, over the `tokens` tokens that the first pass saw of a sequence, of `heads`
// heads from `first` on, from what its blocks left. Of the mean, not the sum: an average token then has a
// score of 0, where 16 bits tell scores apart best. By all kScoreThreads threads, in a fixed order; a barrier
// behind.
__device__ inline void whole_normalisers(float* out, const fasa_decode_params& p, const Scores& scores,
                                         int seq, int tokens, int first, int heads) {
    constexpr int kAtOnce = 8;
    __shared__ float part[kScoreThreads];
    const int blocks = scores.parts, rows = min(kWarp, kScoreThreads / heads), row = threadIdx.x / heads;
    if (row < rows) {
        const float* from = scores.partials + static_cast<int64_t>(seq) * blocks * p.num_q_heads + first +
                            threadIdx.x % heads;
        Normaliser all;
        for (int b = row; b < blocks; b += kAtOnce * rows) {
            float sums[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                sums[i] = b + i * rows < blocks ? from[(b + i * rows) * p.num_q_heads] : -INFINITY;
            }
            all.add(sums);
        }
        part[threadIdx.x] = all.log2_sum();
    }
    __syncthreads();
    if (threadIdx.x < heads) {
        Normaliser all;
        for (int r = 0; r < rows; ++r) {
            all.add({part[r * heads + threadIdx.x]});
        }
        out[threadIdx.x] = all.log2_sum() - log2f(static_cast<float>(tokens));
    }
    __syncthreads();
}

// What the score of one token of a row is clamped to: a single value where the token is hidden or forced.
struct ScoreRange {
    float low = -kScoreLimit, high = kScoreLimit;

    __device__ ScoreRange(const fasa_decode_params& p, int token, int length) {
        if (token >= length) {
            low = high = -INFINITY;
        } else if (is_forced(token, length, p.sink, p.recent)) {
            low = high = INFINITY;
        }
    }
    __device__ float clamp(float score) const { return fminf(fmaxf(score, low), high); }  // of NaN: low
};

}  // namespace fasa
