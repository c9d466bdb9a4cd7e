// Scoring single tokens again, in float32, to break ties at 16 bits.
#pragma once

#include "labels.cuh"

namespace fasa {

struct RescoreScratch {
    float query[kCodes];                 // PREFIX: the token set's query times the logits' scale
    __align__(16) int8_t codes[kCodes];  // otherwise: its int8 codes
    float factor;
};

template <typename T>
struct Rescorer {
    const fasa_decode_params& p;
    RescoreScratch& scratch;
    int seq, set, kv_head;

    // Fetches the query; by the first warp, visible after the next barrier.
    __device__ void prepare(const Scores& scores, int64_t row) {
        if (threadIdx.x >= kWarp) {
            return;
        }
        if (p.labels.kind == FASA_LABELS_PREFIX) {
            reduce_query<T>(scratch.query, p, seq, set);
            for (int d = threadIdx.x; d < 2 * p.labels.n_tip; d += kWarp) {
                scratch.query[d] *= p.scale;
            }
        } else {
            reinterpret_cast<int*>(scratch.codes)[threadIdx.x] =
                reinterpret_cast<const int*>(scores.codes + row * kCodes)[threadIdx.x];
            scratch.factor = scores.factors[row];
        }
    }

    // NaN counts as the lowest score.
    __device__ float operator()(int token) const {
        const float score = p.labels.kind == FASA_LABELS_PREFIX ? from_prefix(token) : from_label(token);
        return score == score ? score : -INFINITY;
    }

  private:
    __device__ float from_prefix(int token) const {
        const uint4* k = reinterpret_cast<const uint4*>(pool_row<T>(p.pool, seq, 0, token, kv_head));
        float sum = 0.f;
        for (int chunk = 0; chunk < p.labels.n_tip / 4; ++chunk) {
            const uint4 eight = k[chunk];
            const auto* pair = reinterpret_cast<const typename Vec2<T>::type*>(&eight);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 value = to_float2(pair[i]);
                const float* q = scratch.query + 8 * chunk + 2 * i;
                sum = fmaf(value.x, q[0], fmaf(value.y, q[1], sum));
            }
        }
        return sum;
    }

    __device__ float from_label(int token) const {
        const LabelAddress at = label_address(p.pool, p.labels, seq, token, kv_head);
        const auto* label = reinterpret_cast<const uint2*>(at.label);
        const auto* code = reinterpret_cast<const uint32_t*>(scratch.codes);
        int sum = 0;
        if (p.labels.kind == FASA_LABELS_INT8) {
            for (int i = 0; i < p.labels.n_tip / 4; ++i) {
                const uint2 eight = label[i];
                sum = __dp4a(static_cast<int>(eight.x), static_cast<int>(code[2 * i]), sum);
                sum = __dp4a(static_cast<int>(eight.y), static_cast<int>(code[2 * i + 1]), sum);
            }
        } else {
            int total = 0;  // of the query's codes: labels are stored + 8
            for (int i = 0; i < p.labels.n_tip / 4; ++i) {
                const uint32_t word = reinterpret_cast<const uint32_t*>(label)[i];
                const uint32_t low = __byte_perm(code[2 * i], code[2 * i + 1], 0x6420);
                const uint32_t high = __byte_perm(code[2 * i], code[2 * i + 1], 0x7531);
                sum = __dp4a(static_cast<int>(word & 0x0f0f0f0f), static_cast<int>(low), sum);
                sum = __dp4a(static_cast<int>(word >> 4 & 0x0f0f0f0f), static_cast<int>(high), sum);
                total = __dp4a(0x01010101, static_cast<int>(low),
                               __dp4a(0x01010101, static_cast<int>(high), total));
            }
            sum -= 8 * total;
        }
        return static_cast<float>(sum) * __half2float(*reinterpret_cast<const __half*>(at.scale)) *
               scratch.factor;
    }
};

// The order of floats as integers.
__device__ inline uint32_t float_rank(float x) {
    const uint32_t bits = __float_as_uint(x + 0.f);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

}  // namespace fasa
