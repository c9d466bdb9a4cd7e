// Scoring single tokens again, in float32, to break ties at 16 bits.
#pragma once

#include "query.cuh"

namespace fasa {

template <typename T>
struct Rescorer {
    const fasa_decode_params& p;
    const Scores& scores;
    int seq, kv_head;
    int64_t first_slot;  // of scores.queries
    int heads;           // slots that make the score together

    // By one warp, for one token; NaN counts as the lowest score.
    __device__ float operator()(int token) const {
        const int dims = 2 * p.labels.n_tip;
        float label[kLabelDims / kWarp];  // this lane's share
        float scale = 1.f;
        if (p.labels.kind == FASA_LABELS_PREFIX) {
            const T* k = pool_row<T>(p.pool, seq, 0, token, kv_head);
            read(label, dims, [&](int d) { return to_float(k[d]); });
        } else {
            const LabelAddress at = label_address(p.pool, p.labels, seq, token, kv_head);
            if (p.labels.kind == FASA_LABELS_FP8) {
                read(label, dims, [&](int d) { return fp8_pair(static_cast<uint8_t>(at.label[d])).x; });
            } else {
                scale = __half2float(*reinterpret_cast<const __half*>(at.scale));
                if (p.labels.kind == FASA_LABELS_INT8) {
                    read(label, dims,
                         [&](int d) { return static_cast<float>(static_cast<int8_t>(at.label[d])); });
                } else {
                    read(label, dims,
                         [&](int d) { return static_cast<float>((at.label[d / 2] >> d % 2 * 4 & 15) - 8); });
                }
            }
        }
        SoftmaxScore soft;
        float score = 0.f;
        for (int h = 0; h < heads; ++h) {
            const int64_t slot = first_slot + h;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < kLabelDims / kWarp; ++i) {
                const int d = i * kWarp + threadIdx.x % kWarp;
                sum += d < dims ? label[i] * scores.queries[slot * kLabelDims + d] : 0.f;
            }
#pragma unroll
            for (int step = kWarp / 2; step; step /= 2) {
                sum += __shfl_xor_sync(0xffffffff, sum, step);
            }
            score = sum * scale * scores.factors[slot];
            soft.add(score, scores.normaliser[slot]);
        }
        score = by_softmax(p.reduction) ? soft.value(p.reduction) : score;
        return score == score ? score : -INFINITY;
    }

  private:
    template <typename Read>
    static __device__ void read(float (&label)[kLabelDims / kWarp], int dims, Read element) {
#pragma unroll
        for (int i = 0; i < kLabelDims / kWarp; ++i) {
            const int d = i * kWarp + threadIdx.x % kWarp;
            label[i] = d < dims ? element(d) : 0.f;
        }
    }
};

// The order of floats as integers.
__device__ inline uint32_t float_rank(float x) {
    const uint32_t bits = __float_as_uint(x + 0.f);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

}  // namespace fasa
