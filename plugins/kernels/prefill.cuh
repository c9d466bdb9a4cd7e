// Dense causal attention of many query tokens a sequence, over keys and values that are already in the pool.
#pragma once

#include "dense.cuh"
#include "flashinfer_tile.cuh"

namespace fasa {

template <typename Params>
struct PrefillTask {
    Params params;  // q and o of token 0
    const PrefillTile* tiles;
    const int32_t* lengths;
    int64_t o_token_stride;  // elements
    int32_t max_blocks;
};

// Grid: tiles, KV heads.
template <typename Traits, typename Params>
__global__ __launch_bounds__(Traits::NUM_THREADS) void prefill_tiles(
    const __grid_constant__ PrefillTask<Params> task) {
    wait_for_previous();
    const PrefillTile tile = task.tiles[blockIdx.x];
    if (tile.seq < 0) {
        return;
    }
    Params params = task.params;
    params.q += static_cast<int64_t>(tile.first_token) * params.q_stride_n;
    params.o += tile.first_token * task.o_token_stride;
    params.query_tokens = tile.query_tokens;
    params.cached_tokens = task.lengths[tile.seq];
    attend_tile<Traits, false>(params, task.max_blocks, tile.seq, tile.index, 0, 1);
}

template <int HEAD_DIM, typename T, bool CAN_CAP>
fasa_status launch_prefill_tiles(const fasa_prefill_params& p, const PrefillTile* tiles, int num_tiles,
                                 cudaStream_t stream) {
    using Params = TileParams<T, T>;
    using Traits = typename TileTraits<prefill_rows(HEAD_DIM), HEAD_DIM, MaskMode::kCausal, T, T,
                                       Attention<CAN_CAP>>::type;
    PrefillTask<Params> task;
    task.params = tile_params<T, T>(p.pool, p.num_q_heads, p.scale, p.softcap, p.window);
    task.params.q = const_cast<T*>(static_cast<const T*>(p.q));
    task.params.q_stride_n = static_cast<int32_t>(p.q_token_stride);
    task.params.o = static_cast<T*>(p.out);
    task.tiles = tiles;
    task.lengths = p.lengths;
    task.o_token_stride = p.num_q_heads * HEAD_DIM;
    task.max_blocks = p.pool.max_blocks;
    const dim3 grid(num_tiles, p.pool.num_kv_heads);
    return launch_tiles<Traits>(prefill_tiles<Traits, Params>, grid, task, stream);
}

template <int HEAD_DIM>
fasa_status launch_prefill(const fasa_prefill_params& p, const PrefillTile* tiles, int num_tiles,
                           cudaStream_t stream) {
    const bool capped = p.softcap > 0.f;
    if (p.pool.dtype == FASA_FLOAT16) {
        return capped ? launch_prefill_tiles<HEAD_DIM, __half, true>(p, tiles, num_tiles, stream)
                      : launch_prefill_tiles<HEAD_DIM, __half, false>(p, tiles, num_tiles, stream);
    }
    return capped ? launch_prefill_tiles<HEAD_DIM, __nv_bfloat16, true>(p, tiles, num_tiles, stream)
                  : launch_prefill_tiles<HEAD_DIM, __nv_bfloat16, false>(p, tiles, num_tiles, stream);
}

}  // namespace fasa
