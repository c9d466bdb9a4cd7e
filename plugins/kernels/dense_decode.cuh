// Dense attention of one query token a sequence: the heads of a group are the rows of a tile of 16, so that
// the tensor cores read each key once for all of them. Bound by memory: keys and values are read once.
#pragma once

#include "dense.cuh"
#include "flashinfer_tile.cuh"

namespace fasa {

template <typename Params>
struct DecodeTask {
    Params params;  // q, o and lse of sequence 0
    const int32_t* lengths;
    int64_t q_seq_stride, o_seq_stride, lse_seq_stride;  // elements
    int32_t max_blocks, longest, window, chunk_tokens;
};

// Grid: chunks, KV heads, sequences.
template <typename Traits, bool SPLIT, typename Params>
__global__ __launch_bounds__(Traits::NUM_THREADS) void decode_tiles(
    const __grid_constant__ DecodeTask<Params> task) {
    wait_for_previous();
    const int seq = blockIdx.z, chunk = blockIdx.x;
    const int length = task.lengths[seq];
    const int64_t first = static_cast<int64_t>(chunk) * task.chunk_tokens;
    if (length > task.longest || first >= seen_tokens(length, task.window)) {
        return;
    }
    Params params = task.params;
    params.q += seq * task.q_seq_stride;
    params.o += seq * task.o_seq_stride;
    if (SPLIT) {
        params.lse += seq * task.lse_seq_stride;
    }
    params.query_tokens = 1;
    params.cached_tokens = length;
    attend_tile<Traits, SPLIT>(params, task.max_blocks, seq, 0, chunk, task.chunk_tokens);
}

template <int HEAD_DIM, typename T, bool SPLIT>
fasa_status launch_decode_tiles(const fasa_decode_params& p, int longest, const Partials& partials,
                                cudaStream_t stream) {
    using Out = std::conditional_t<SPLIT, float, T>;
    using Params = TileParams<T, Out>;
    using Traits = typename TileTraits<16, HEAD_DIM, MaskMode::kNone, T, Out, Attention<true>>::type;
    DecodeTask<Params> task;
    task.params = tile_params<T, Out>(p.pool, p.num_q_heads, p.scale, p.softcap, p.window);
    task.params.q = const_cast<T*>(static_cast<const T*>(p.q));
    task.params.q_stride_n = p.num_q_heads * HEAD_DIM;
    task.params.o = static_cast<Out*>(SPLIT ? partials.out : p.out);
    task.params.lse = SPLIT ? partials.lse : nullptr;
    task.lengths = p.lengths;
    task.q_seq_stride = p.num_q_heads * HEAD_DIM;
    task.lse_seq_stride = static_cast<int64_t>(p.num_q_heads) * partials.chunks;
    task.o_seq_stride = SPLIT ? task.lse_seq_stride * partials.width : task.q_seq_stride;
    task.max_blocks = p.pool.max_blocks;
    task.longest = longest;
    task.window = p.window;
    task.chunk_tokens = partials.chunk_tokens;
    const dim3 grid(partials.chunks, p.pool.num_kv_heads, p.num_seqs);
    return launch_tiles<Traits>(decode_tiles<Traits, SPLIT, Params>, grid, task, stream);
}

template <int HEAD_DIM>
fasa_status launch_dense_chunks(const fasa_decode_params& p, int longest, const Partials& partials,
                                cudaStream_t stream) {
    const bool split = partials.chunks > 1;
    if (p.pool.dtype == FASA_FLOAT16) {
        return split ? launch_decode_tiles<HEAD_DIM, __half, true>(p, longest, partials, stream)
                     : launch_decode_tiles<HEAD_DIM, __half, false>(p, longest, partials, stream);
    }
    return split ? launch_decode_tiles<HEAD_DIM, __nv_bfloat16, true>(p, longest, partials, stream)
                 : launch_decode_tiles<HEAD_DIM, __nv_bfloat16, false>(p, longest, partials, stream);
}

}  // namespace fasa
