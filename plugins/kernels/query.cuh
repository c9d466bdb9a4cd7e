// Queries over the label dims: one slot for each group (their sum) or for each head, and what scores become
// keys by.
#pragma once

#include "labels.cuh"

namespace fasa {

__host__ __device__ inline bool by_softmax(fasa_reduction reduction) {
    return reduction == FASA_REDUCE_MEAN_SOFTMAX || reduction == FASA_REDUCE_MAX_SOFTMAX;
}

// The factor on logits: softmax reductions work with powers of two.
__host__ __device__ inline float logit_factor(const fasa_decode_params& p) {
    return by_softmax(p.reduction) ? p.scale * kLog2e : p.scale;
}

__device__ inline float element(fasa_dtype dtype, const void* array, int64_t i) {
    return dtype == FASA_FLOAT16 ? to_float(static_cast<const __half*>(array)[i])
                                 : to_float(static_cast<const __nv_bfloat16*>(array)[i]);
}

// The query of a slot over its label dims: `heads` heads from `first` on, summed in their order. `out` is
// shared memory of 2 * n_tip floats; one warp works together.
__device__ inline void reduce_query(float* out, const fasa_decode_params& p, int seq, int first, int heads) {
    const int64_t at = (static_cast<int64_t>(seq) * p.num_q_heads + first) * p.pool.head_dim;
    for (int d = threadIdx.x % kWarp; d < 2 * p.labels.n_tip; d += kWarp) {
        float sum = 0.f;
        for (int h = 0; h < heads; ++h) {
            sum += element(p.pool.dtype, p.q, at + h * p.pool.head_dim + d);
        }
        out[d] = sum;
    }
    __syncwarp();
}

// Replaces `query` (n floats in shared memory) by its int8 codes; one warp. Returns the scale.
__device__ inline float quantise_query(float* query, int n) {
    const float scale = fmaxf(largest_magnitude(query, n), 1e-20f) / 127.f;
    for (int d = threadIdx.x % kWarp; d < n; d += kWarp) {
        query[d] = static_cast<float>(max(-127, min(127, __float2int_rn(query[d] / scale))));
    }
    __syncwarp();
    return scale;
}

// Several heads' softmaxed logits as one score, in powers of two: log2 of their sum, or their maximum. NaN
// logits count for nothing.
struct SoftmaxScore {
    float sum, peak;

    __device__ explicit SoftmaxScore(float sum = 0.f, float peak = -INFINITY) : sum(sum), peak(peak) {}

    __device__ void add(float logit, float normaliser) {
        const float power = logit - normaliser;
        peak = fmaxf(peak, power);  // of NaN: the other
        sum += power == power ? exp2f(power) : 0.f;
    }
    __device__ float value(fasa_reduction reduction) const {
        // Sums that (nearly) vanish are told apart by their largest part.
        return reduction == FASA_REDUCE_MEAN_SOFTMAX && sum > 1e-30f ? log2f(sum) : peak;
    }
};

// The maximum and the sum of exponentials of logits seen so far; NaN and infinity do no harm.
struct Normaliser {
    float peak = -INFINITY, sum = 0.f;

    template <int N>
    __device__ void add(const float (&logit)[N]) {
        float top = peak;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            top = fmaxf(top, fminf(logit[i], 1e30f));  // of NaN: the other
        }
        if (top == -INFINITY) {
            return;
        }
        sum *= exp2f(peak - top);
        peak = top;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float x = exp2f(fminf(logit[i], 1e30f) - top);  // of NaN: 1e30
            sum += logit[i] == logit[i] ? x : 0.f;
        }
    }
    __device__ void merge(float2 other) {
        const float top = fmaxf(peak, other.x);
        if (top > -INFINITY) {
            sum = sum * exp2f(peak - top) + other.y * exp2f(other.x - top);
            peak = top;
        }
    }
    __device__ void merge_lanes(int first_step, int last_step) {
        for (int step = first_step; step <= last_step; step *= 2) {
            merge({__shfl_xor_sync(0xffffffff, peak, step), __shfl_xor_sync(0xffffffff, sum, step)});
        }
    }
};

// log2 of the sum of exponentials of one head over a sequence, from the parts that the blocks of the first
// pass left; one warp, in a fixed order.
__device__ inline float whole_normaliser(const Scores& scores, int seq, int blocks, int heads, int head) {
    Normaliser all;
    for (int b = threadIdx.x % kWarp; b < blocks; b += kWarp) {
        all.merge(scores.partials[(static_cast<int64_t>(seq) * blocks + b) * heads + head]);
    }
    all.merge_lanes(1, kWarp / 2);
    return all.peak + log2f(fmaxf(all.sum, 1e-37f));
}

// The key of one token of a row.
__device__ inline uint32_t token_key(const fasa_decode_params& p, int token, int length, float score) {
    if (token >= length) {
        return kHidden;
    }
    return is_forced(token, length, p.sink, p.recent) ? kForced : score_key(score);
}

__device__ inline uint32_t larger_key(uint32_t a, uint32_t b) {
    return __hgt(__ushort_as_half(a), __ushort_as_half(b)) ? a : b;
}

}  // namespace fasa
