// Prefill for compute capability 9.0: FlashInfer's kernels after FlashAttention-3, whose warp groups load and
// multiply in turns. One query head a tile, so it pays where sequences have many query tokens. Only for plain
// causal attention: with a window FlashInfer 0.6.18 loads the wrong block of values last.
#pragma once

// Instead of FlashInfer's cutlass_utils.cuh, which includes all of CUTLASS and cuRAND for nothing used here.
#define FLASHINFER_CUTLASS_UTILS_CUH_
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
#include <flashinfer/attention/hopper/variants.cuh>

#include "dense.cuh"
#include "launch.cuh"

namespace fasa {

struct HopperScale {
    float sm_scale;
};

// In the place of FlashInfer's schedulers, whose plans come from the host: one listed tile for each block of
// threads. Grid: tiles, query heads.
struct ListedTile {
    struct Params {
        const PrefillTile* tiles;
        const int32_t* lengths;
        int32_t offsets_row;  // 2 * max_blocks: from one sequence's key offsets to the next's
        cutlass::FastDivmod group_size;
    };

    struct WorkTileInfo {
        PrefillTile tile;
        int length;

        CUTLASS_DEVICE bool is_valid(const Params&) const { return tile.seq >= 0; }

        CUTLASS_DEVICE auto get_block_coord(const Params& params) const {
            const int head = blockIdx.y;
            return cute::tuple{tile.index,
                               head,
                               params.group_size.divide(head),
                               tile.first_token,
                               tile.seq * params.offsets_row,
                               tile.query_tokens,
                               length,
                               tile.seq};
        }
    };

    CUTLASS_DEVICE WorkTileInfo get_initial_work(const Params& params) const {
        const PrefillTile tile = params.tiles[blockIdx.x];
        return {tile, tile.seq >= 0 ? params.lengths[tile.seq] : 0};
    }

    CUTLASS_DEVICE void init_consumer() const {}
    CUTLASS_DEVICE void prefetch_next_work(const Params&, WorkTileInfo&) const {}
    CUTLASS_DEVICE void broadcast_next_work(WorkTileInfo&) const {}

    template <bool IS_PRODUCER>
    CUTLASS_DEVICE WorkTileInfo get_next_work(const Params&, const WorkTileInfo&) const {
        return {{-1, 0, 0, 0}, 0};
    }
};

// Keys of a tile, as FlashInfer chooses them.
constexpr int hopper_keys(int head_dim) {
    return head_dim > 128 ? 32 : 96;
}

template <int HEAD_DIM, typename Scalar>
fasa_status launch_prefill_hopper(const fasa_prefill_params& p, const PrefillTile* tiles, int num_tiles,
                                  cudaStream_t stream) {
    using namespace flashinfer;
    using T = std::conditional_t<std::is_same_v<Scalar, __half>, cutlass::half_t, cutlass::bfloat16_t>;
    using Traits = AttentionKernelTraits<false, HEAD_DIM, HEAD_DIM, hopper_rows(HEAD_DIM),
                                         hopper_keys(HEAD_DIM), 2, T, T, T, int32_t, StandardAttention>;
    using Mainloop = SparseCollectiveMainloop<HopperScale, Traits, true>;
    using Epilogue = CollectiveEpilogue<Traits>;
    const fasa_pool& pool = p.pool;
    const int64_t page = static_cast<int64_t>(pool.heads_per_block) * pool.tokens_per_block * HEAD_DIM;
    const int64_t kv_head = static_cast<int64_t>(pool.tokens_per_block) * HEAD_DIM;
    const T* keys = static_cast<const T*>(pool.primary);
    const auto kv_layout = get_gmem_layout(0, pool.num_kv_heads, HEAD_DIM, HEAD_DIM, kv_head);
    const typename Mainloop::Params mainloop = Mainloop::to_underlying_arguments(
        {static_cast<const T*>(p.q),
         get_gmem_layout(p.num_tokens, p.num_q_heads, HEAD_DIM, p.q_token_stride, HEAD_DIM), keys, kv_layout,
         keys + page, kv_layout, pool.offsets, -1, page, page, static_cast<uint32_t>(pool.tokens_per_block),
         HopperScale{p.scale}});
    const typename Epilogue::Params epilogue = Epilogue::to_underlying_arguments(
        {static_cast<T*>(p.out),
         get_gmem_layout(p.num_tokens, p.num_q_heads, HEAD_DIM, int64_t(p.num_q_heads) * HEAD_DIM, HEAD_DIM),
         nullptr, get_lse_gmem_layout(p.num_tokens, p.num_q_heads)});
    const ListedTile::Params listed = {tiles, p.lengths, 2 * pool.max_blocks,
                                       cutlass::FastDivmod(p.num_q_heads / pool.num_kv_heads)};
    auto* kernel = PrefillWithKVCacheKernel<Mainloop, Epilogue, Traits, false, true, ListedTile>;
    constexpr int kShared = sizeof(typename Traits::SharedStorage);
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared) != cudaSuccess) {
        return FASA_LAUNCH_FAILED;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(num_tiles, p.num_q_heads);
    config.blockDim = dim3(Traits::NUM_THREADS);
    config.dynamicSmemBytes = kShared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, mainloop, epilogue, listed) == cudaSuccess
               ? FASA_OK
               : FASA_LAUNCH_FAILED;
}

}  // namespace fasa
