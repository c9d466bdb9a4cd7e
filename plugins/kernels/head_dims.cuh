// The head_dims that the library was built for: those with FASA_HAS_<head_dim> defined as 1.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fasa.h"

namespace fasa {

// Calls `launch` with the head_dim as a constant, if the library was built for it.
template <typename Launch>
fasa_status with_head_dim(int head_dim, Launch launch) {
    switch (head_dim) {
#if FASA_HAS_64
        case 64:
            return launch(std::integral_constant<int, 64>());
#endif
#if FASA_HAS_96
        case 96:
            return launch(std::integral_constant<int, 96>());
#endif
#if FASA_HAS_128
        case 128:
            return launch(std::integral_constant<int, 128>());
#endif
#if FASA_HAS_256
        case 256:
            return launch(std::integral_constant<int, 256>());
#endif
        default:
            return FASA_UNSUPPORTED;
    }
}

// The ranges that fasa.h states for a pool, but for head_dim.
inline bool pool_valid(const fasa_pool& pool) {
    const int tokens = pool.tokens_per_block;
    return tokens >= 8 && tokens <= 128 && (tokens & (tokens - 1)) == 0 && pool.num_kv_heads >= 1 &&
           pool.num_kv_heads <= 32 && pool.max_blocks >= 1 &&
           (pool.heads_per_block == 0 || pool.heads_per_block >= pool.num_kv_heads) &&
           pool.heads_per_block <= INT32_MAX / 2 / tokens / std::max(pool.head_dim, 1) &&  // bytes of a block
           (pool.dtype == FASA_FLOAT16 || pool.dtype == FASA_BFLOAT16);
}

// `params` as the kernels want them: with the number of heads that a block has room for.
template <typename Params>
Params completed(const Params& params) {
    Params p = params;
    p.pool.heads_per_block = p.pool.heads_per_block == 0 ? p.pool.num_kv_heads : p.pool.heads_per_block;
    return p;
}

// What the parameters of dense decode and of prefill have in common.
template <typename Params>
bool dense_valid(const Params& p) {
    const fasa_pool& pool = p.pool;
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.out) |
                                reinterpret_cast<uintptr_t>(pool.primary);
    return pool_valid(pool) && addresses % 16 == 0 && p.num_q_heads >= 1 &&
           p.num_q_heads % pool.num_kv_heads == 0 && p.num_q_heads / pool.num_kv_heads <= 16 &&
           p.num_seqs >= 1 && p.num_seqs <= 65535 && p.window >= 0;
}

}  // namespace fasa
