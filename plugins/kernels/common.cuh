// What the kernels share: addresses in the paged pool, ordered 16-bit scores, element conversion.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "fasa.h"

namespace fasa {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.4426950408889634f;
constexpr int kOctet = 8;  // tokens that one thread scores at a time; blocks of the pool hold whole octets

template <typename T>
struct Vec2;
template <>
struct Vec2<__half> {
    using type = __half2;
};
template <>
struct Vec2<__nv_bfloat16> {
    using type = __nv_bfloat162;
};

__device__ inline float to_float(__half x) {
    return __half2float(x);
}
__device__ inline float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ inline float2 to_float2(__half2 x) {
    return __half22float2(x);
}
__device__ inline float2 to_float2(__nv_bfloat162 x) {
    return __bfloat1622float2(x);
}
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// The octets that a sequence has, the last one perhaps not whole.
__host__ __device__ inline int octets_of(int length) {
    return (length + kOctet - 1) / kOctet;
}

// Block number of a token's block of keys (kind 0) or values (kind 1); bit 31 tells the pool.
__device__ inline int32_t block_offset(const fasa_pool& pool, int seq, int kind, int token) {
    const int block = token >> (__ffs(pool.tokens_per_block) - 1);
    return pool.offsets[(static_cast<int64_t>(seq) * 2 + kind) * pool.max_blocks + block];
}
__device__ inline int32_t key_offset(const fasa_pool& pool, int seq, int token) {
    return block_offset(pool, seq, 0, token);
}

__device__ inline uint32_t block_bytes(const fasa_pool& pool) {
    return 2u * pool.tokens_per_block * pool.heads_per_block * pool.head_dim;
}

// The row of `head_dim` elements of one token, for who has looked up its block's offset.
template <typename T>
__device__ inline T* pool_row_at(const fasa_pool& pool, int32_t offset, int token, int kv_head) {
    const int shift = __ffs(pool.tokens_per_block) - 1;
    char* primary = static_cast<char*>(pool.primary);
    asm("" : "+l"(primary));  // else the compiler looks up one of two in memory
    char* base = offset < 0 ? static_cast<char*>(pool.secondary) : primary;
    base += static_cast<uint64_t>(offset & 0x7fffffffu) * block_bytes(pool);
    const uint32_t row = (kv_head << shift) + (token & (pool.tokens_per_block - 1));
    return reinterpret_cast<T*>(base) + row * pool.head_dim;
}

// The same, after looking it up.
template <typename T>
__device__ inline T* pool_row(const fasa_pool& pool, int seq, int kind, int token, int kv_head) {
    return pool_row_at<T>(pool, block_offset(pool, seq, kind, token), token, kv_head);
}

// The score pass leaves each score as float16: the hardware compares two at a time. Minus infinity hides a
// token beyond the end, plus infinity marks one that is always taken; real scores stay inside +-kScoreLimit,
// NaN counts as the lowest. Tokens that tie at 16 bits are told apart by their float32 score.
constexpr uint32_t kHidden = 0xfc00;
constexpr uint32_t kForced = 0x7c00;
constexpr uint32_t kLowest = 0xfbff;  // -kScoreLimit
constexpr float kScoreLimit = 65504.f;

// The order of float16 as integers, and back.
__device__ inline uint32_t key_rank(uint32_t key) {
    return key & 0x8000 ? 0xffff ^ key : key | 0x8000;
}
__device__ inline uint32_t rank_key(uint32_t rank) {
    return rank & 0x8000 ? rank ^ 0x8000 : 0xffff ^ rank;
}

__device__ inline __half2 as_half2(uint32_t word) {
    return *reinterpret_cast<const __half2*>(&word);
}

// The keys of two scores inside their ranges.
__device__ inline uint32_t key_pair(float first, float second) {
    const __half2 keys = __hadd2(__floats2half2_rn(first, second), __half2{});  // + 0: one zero only
    return *reinterpret_cast<const uint32_t*>(&keys);
}

// The larger keys of two pairs.
__device__ inline uint32_t larger_pair(uint32_t a, uint32_t b) {
    const __half2 larger = __hmax2(as_half2(a), as_half2(b));
    return *reinterpret_cast<const uint32_t*>(&larger);
}

// Lets the next kernel on the stream start its prologue.
__device__ inline void allow_next() {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

__device__ inline bool is_forced(int token, int length, int sink, int recent) {
    return token < sink || token >= length - recent;
}

// Where the score pass leaves its results. A row is a (sequence, token set) pair; a KV head has one token
// set, or one for each of its query heads. A slot is a query that labels are multiplied with: the sum of a
// group's heads, or one head.
//
// Keys come in octets, of eight consecutive tokens, float16 [rows, octets, 8], with the largest of each
// octet, float16 [rows, octets].
struct Scores {
    uint16_t* keys;
    uint16_t* maxima;
    int octets;      // per row, a multiple of 8
    float* queries;  // [seqs, slots, kLabelDims]: as the score pass multiplied them (codes, where quantised)
    float* factors;  // [seqs, slots]: on the products with those
    float* normaliser;  // [seqs, query heads]: log2 of the mean power of two; softmax reductions only
    float* partials;    // [seqs, parts, query heads]: log2 of the sum over what one block of threads saw
    int parts;
};

constexpr int kLabelDims = 128;  // at most

}  // namespace fasa
