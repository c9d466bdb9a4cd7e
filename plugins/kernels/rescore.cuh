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

    static constexpr int kShare = kLabelDims / kWarp;  // of a row of label dims, a lane
    struct Slot {
        float query[kShare], factor, normaliser;
    };
    Slot first;  // long before it is needed

    __device__ Rescorer(const fasa_decode_params& p, const Scores& scores, int seq, int kv_head,
                        int64_t first_slot, int heads)
        : p(p),
          scores(scores),
          seq(seq),
          kv_head(kv_head),
          first_slot(first_slot),
          heads(heads),
          first(slot(0)) {}

    // By one warp, for one token, with the offset of its block of keys; NaN counts as the lowest score.
    __device__ float operator()(int token, int32_t offset) const {
        const int dims = 2 * p.labels.n_tip;
        float label[kShare];  // this lane's share
        float scale = 1.f;
        if (p.labels.kind == FASA_LABELS_PREFIX) {
            const T* k = pool_row_at<T>(p.pool, offset, token, kv_head);
            read(label, dims, [&](int d) { return to_float(k[d]); });
        } else {
            const LabelAddress at = label_address_at(p.pool, p.labels, offset, token, kv_head);
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
        Slot head = first;  // and the next one is asked for while this one is multiplied
        for (int h = 0; h < heads; ++h) {
            const Slot next = h + 1 < heads ? slot(h + 1) : head;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < kShare; ++i) {
                sum += label[i] * head.query[i];
            }
#pragma unroll
            for (int step = kWarp / 2; step; step /= 2) {
                sum += __shfl_xor_sync(0xffffffff, sum, step);
            }
            score = sum * scale * head.factor;
            soft.add(score, head.normaliser);
            head = next;
        }
        score = by_softmax(p.reduction) ? soft.value(p.reduction) : score;
        return score == score ? score : -INFINITY;
    }

    __device__ float operator()(int token) const { return (*this)(token, key_offset(p.pool, seq, token)); }

  private:
    __device__ Slot slot(int index) const {
        const int64_t at = first_slot + index;
        Slot found{{}, scores.factors[at], scores.normaliser[at]};
        read(found.query, 2 * p.labels.n_tip, [&](int d) { return scores.queries[at * kLabelDims + d]; });
        return found;
    }
    template <typename Read>
    static __device__ void read(float (&share)[kShare], int dims, Read element) {
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            const int d = i * kWarp + threadIdx.x % kWarp;
            share[i] = d < dims ? element(d) : 0.f;
        }
    }
};

// The order of floats as integers.
__device__ inline uint32_t float_rank(float x) {
    const uint32_t bits = __float_as_uint(x + 0.f);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

}  // namespace fasa
