// Labels as the score pass reads them: formats, and the products of a few of them with one query.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "common.cuh"

namespace fasa {

// Four products of signed bytes, added to `sum`.
__device__ inline int dp4a(uint32_t a, uint32_t b, int sum) {
    return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}

__device__ inline float2 fp8_pair(uint32_t two) {
    return __half22float2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3));
}

// Shared memory read where the code says so. Volatile where KEEP is false: the compiler would otherwise hold
// a query of many words in registers that labels in flight need.
template <bool KEEP>
__device__ inline uint4 shared_16(const uint32_t* source) {
    if constexpr (KEEP) {
        return *reinterpret_cast<const uint4*>(source);
    }
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(source))));
    return x;
}

// Labels of KIND in WORDS 32-bit words a row, and a query laid out in shared memory to meet them: four
// words at a time. INT4 wants for label words w, w + 1: four codes for the low nibbles of w, of w + 1, then
// for the high ones. INT8 four codes a word. FP8 four floats a word.
template <fasa_label_kind KIND, int WORDS>
struct LabelFormat {
    static constexpr bool kInt4 = KIND == FASA_LABELS_INT4, kFloat = KIND == FASA_LABELS_FP8;
    static constexpr int kWords = WORDS;
    static constexpr int kDims = kInt4 ? 8 * WORDS : 4 * WORDS;
    static constexpr int kQueryWords = kInt4 ? 2 * WORDS : kFloat ? 4 * WORDS : WORDS;
    static constexpr bool kKeep = WORDS <= 16 && !kFloat;
    static constexpr int kStride = kQueryWords + 4;  // between queries: keeps eight of them in other banks
    using Sum = std::conditional_t<kFloat, float, int>;

    // Writes `query` (kDims floats; small integers unless FP8) to `packed` (shared memory); one warp.
    static __device__ void pack(uint32_t* packed, const float* query) {
        for (int w = threadIdx.x % kWarp; w < kQueryWords; w += kWarp) {
            if constexpr (kFloat) {
                packed[w] = __float_as_uint(query[w]);
            } else {
                uint32_t word = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int dim = kInt4 ? w / 4 * 16 + w % 2 * 8 + 2 * i + w % 4 / 2 : 4 * w + i;
                    word |= (static_cast<uint32_t>(static_cast<int>(query[dim])) & 0xff) << 8 * i;
                }
                packed[w] = word;
            }
        }
    }

    // What a sum of products starts from: 4-bit codes are stored + 8. One warp.
    static __device__ Sum start(const float* query) {
        if constexpr (kInt4) {
            int total = 0;
            for (int d = threadIdx.x % kWarp; d < kDims; d += kWarp) {
                total += static_cast<int>(query[d]);
            }
            return -8 * __reduce_add_sync(0xffffffff, total);
        }
        return Sum{};
    }

    // Adds the products of N labels with a packed query.
    template <int N>
    static __device__ void multiply(Sum (&sum)[N], const uint32_t (&label)[N][WORDS],
                                    const uint32_t* packed) {
#pragma unroll
        for (int w = 0; w < WORDS; w += kInt4 ? 2 : kFloat ? 1 : 4) {
            const uint4 query = shared_16<kKeep>(packed + w * kQueryWords / WORDS);
            if constexpr (kInt4) {
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    sum[i] = dp4a(label[i][w] & 0x0f0f0f0f, query.x, sum[i]);
                    sum[i] = dp4a(label[i][w + 1] & 0x0f0f0f0f, query.y, sum[i]);
                    sum[i] = dp4a(label[i][w] >> 4 & 0x0f0f0f0f, query.z, sum[i]);
                    sum[i] = dp4a(label[i][w + 1] >> 4 & 0x0f0f0f0f, query.w, sum[i]);
                }
            } else if constexpr (kFloat) {
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const float2 low = fp8_pair(label[i][w] & 0xffff), high = fp8_pair(label[i][w] >> 16);
                    sum[i] = fmaf(low.x, __uint_as_float(query.x), sum[i]);
                    sum[i] = fmaf(low.y, __uint_as_float(query.y), sum[i]);
                    sum[i] = fmaf(high.x, __uint_as_float(query.z), sum[i]);
                    sum[i] = fmaf(high.y, __uint_as_float(query.w), sum[i]);
                }
            } else {
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    sum[i] = dp4a(label[i][w], query.x, sum[i]);
                    sum[i] = dp4a(label[i][w + 1], query.y, sum[i]);
                    sum[i] = dp4a(label[i][w + 2], query.z, sum[i]);
                    sum[i] = dp4a(label[i][w + 3], query.w, sum[i]);
                }
            }
        }
    }
};

// Calls `launch` with n_tip as a constant.
template <typename Launch>
fasa_status with_n_tip(int n_tip, Launch launch) {
    switch (n_tip) {
        case 8:
            return launch(std::integral_constant<int, 8>());
        case 16:
            return launch(std::integral_constant<int, 16>());
        case 24:
            return launch(std::integral_constant<int, 24>());
        case 32:
            return launch(std::integral_constant<int, 32>());
        case 48:
            return launch(std::integral_constant<int, 48>());
        case 64:
            return launch(std::integral_constant<int, 64>());
        default:
            return FASA_UNSUPPORTED;
    }
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

// The largest of a warp's values, none of which has a sign: their bits have the same order.
__device__ inline float largest_in_warp(float x) {
    return __uint_as_float(__reduce_max_sync(0xffffffff, __float_as_uint(x)));
}

// Of n floats in shared memory; one warp.
__device__ inline float largest_magnitude(const float* x, int n) {
    float largest = 0.f;
    for (int d = threadIdx.x % kWarp; d < n; d += kWarp) {
        largest = fmaxf(largest, fabsf(x[d]));
    }
    return largest_in_warp(largest);
}

// Where a token's label and its scale lie.
struct LabelAddress {
    char* label;
    char* scale;
};

// For who has looked up the offset of the token's block of keys.
__device__ inline LabelAddress label_address_at(const fasa_pool& pool, const fasa_labels& labels,
                                                int32_t offset, int token, int kv_head) {
    const int64_t block = (offset & 0x7fffffffu) / static_cast<uint32_t>(labels.offset_divisor);
    const int64_t pool_distance = offset < 0 ? labels.secondary_distance : 0;
    const int slot = token & (pool.tokens_per_block - 1);
    return {static_cast<char*>(labels.labels) + pool_distance + block * labels.label_block_stride +
                slot * labels.label_token_stride + kv_head * labels.label_head_stride,
            static_cast<char*>(labels.scales) + pool_distance + block * labels.scale_block_stride +
                slot * labels.scale_token_stride + kv_head * labels.scale_head_stride};
}

__device__ inline LabelAddress label_address(const fasa_pool& pool, const fasa_labels& labels, int seq,
                                             int token, int kv_head) {
    return label_address_at(pool, labels, key_offset(pool, seq, token), token, kv_head);
}

}  // namespace fasa
