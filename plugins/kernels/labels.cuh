// Scoring one label: the arithmetic, apart from how tokens are laid over threads.
#pragma once

#include "common.cuh"

namespace fasa {

// A query quantised to int8 for one token set. `code` holds 4 int8 per word, ordered as the label's words
// want them: INT8 needs WORDS words, INT4 twice as many (low nibbles, then high nibbles). score = (dot -
// offset) * label scale * query scale.
template <int WORDS, bool INT4>
struct QuantisedQuery {
    int code[INT4 ? 2 * WORDS : WORDS];
    int offset;  // what the + 8 of 4-bit codes adds to every dot product
};

template <int WORDS, bool INT4>
__device__ inline int label_dot(const uint32_t (&label)[WORDS], const QuantisedQuery<WORDS, INT4>& query) {
    int sum = -query.offset;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        if constexpr (INT4) {
            sum = __dp4a(static_cast<int>(label[w] & 0x0f0f0f0f), query.code[w], sum);
            sum = __dp4a(static_cast<int>((label[w] >> 4) & 0x0f0f0f0f), query.code[WORDS + w], sum);
        } else {
            sum = __dp4a(static_cast<int>(label[w]), query.code[w], sum);
        }
    }
    return sum;
}

// Reads of what is used once. Volatile, so that the compiler leaves all of a batch in flight before the first
// use.
__device__ inline uint4 load_16(const void* source) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(source));
    return x;
}

__device__ inline uint2 load_8(const void* source) {
    uint2 x;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(source));
    return x;
}

// Reads 4 * WORDS bytes that start at a multiple of 8 (16 where WORDS allows).
template <int WORDS>
__device__ inline void load_label(uint32_t (&label)[WORDS], const char* source) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 4; ++i) {
            const uint4 part = load_16(source + 16 * i);
            label[4 * i] = part.x, label[4 * i + 1] = part.y;
            label[4 * i + 2] = part.z, label[4 * i + 3] = part.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < WORDS / 2; ++i) {
            const uint2 part = load_8(source + 8 * i);
            label[2 * i] = part.x, label[2 * i + 1] = part.y;
        }
    }
}

// Where a token's label and its scale lie.
struct LabelAddress {
    const char* label;
    const char* scale;
};

__device__ inline LabelAddress label_address(const fasa_pool& pool, const fasa_labels& labels, int seq,
                                             int token, int kv_head) {
    const int shift = __ffs(pool.tokens_per_block) - 1;
    const int64_t block = (block_offset(pool, seq, 0, token >> shift) & 0x7fffffff) / labels.offset_divisor;
    const int slot = token & (pool.tokens_per_block - 1);
    return {static_cast<const char*>(labels.labels) + block * labels.label_block_stride +
                slot * labels.label_token_stride + kv_head * labels.label_head_stride,
            static_cast<const char*>(labels.scales) + block * labels.scale_block_stride +
                slot * labels.scale_token_stride + kv_head * labels.scale_head_stride};
}

// The query of a token set over its label dims, in float32: the sum of a group's heads, or one head. `out` is
// shared memory of 2 * n_tip floats; one warp works together. Summed in the order of the heads.
template <typename T>
__device__ void reduce_query(float* out, const fasa_decode_params& p, int seq, int set) {
    const int group = p.num_q_heads / p.pool.num_kv_heads;
    const bool per_head = p.reduction == FASA_REDUCE_PER_HEAD;
    const int first = per_head ? set : set * group;
    const int heads = per_head ? 1 : group;
    const T* q =
        static_cast<const T*>(p.q) + (static_cast<int64_t>(seq) * p.num_q_heads + first) * p.pool.head_dim;
    for (int d = threadIdx.x % kWarp; d < 2 * p.labels.n_tip; d += kWarp) {
        float sum = 0.f;
        for (int h = 0; h < heads; ++h) {
            sum += to_float(q[h * p.pool.head_dim + d]);
        }
        out[d] = sum;
    }
    __syncwarp();
}

// Quantises `query` (n floats in shared memory) to int8 `codes` (shared memory) by one warp. Returns the
// scale.
__device__ inline float quantise_query(const float* query, int8_t* codes, int n) {
    const int lane = threadIdx.x % kWarp;
    float largest = 0.f;
    for (int d = lane; d < n; d += kWarp) {
        largest = fmaxf(largest, fabsf(query[d]));
    }
    for (int step = kWarp / 2; step; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, step));
    }
    const float scale = fmaxf(largest, 1e-20f) / 127.f;
    for (int d = lane; d < n; d += kWarp) {
        codes[d] = static_cast<int8_t>(max(-127, min(127, __float2int_rn(query[d] / scale))));
    }
    __syncwarp();
    return scale;
}

// A thread's copy of int8 codes, in the order of the label's words.
template <int WORDS, bool INT4>
__device__ inline void pack_query(QuantisedQuery<WORDS, INT4>& query, const int8_t* codes) {
    int total = 0;
#pragma unroll
    for (int w = 0; w < (INT4 ? 2 * WORDS : WORDS); ++w) {
        uint32_t packed = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // nibble j of byte b holds element 2 b + j
            const int code = codes[INT4 ? 8 * (w % WORDS) + 2 * i + w / WORDS : 4 * w + i];
            packed |= static_cast<uint32_t>(code & 0xff) << (8 * i);
            total += code;
        }
        query.code[w] = static_cast<int>(packed);
    }
    query.offset = INT4 ? 8 * total : 0;
}

}  // namespace fasa
