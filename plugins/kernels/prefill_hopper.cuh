// Prefill for compute capability 9.0: FlashInfer's kernels after FlashAttention-3, whose warp groups load and
// multiply in turns, with a producer of our own (paged_mainloop.cuh). One query head a tile, so it pays where
// sequences have many query tokens. Only for plain causal attention.
#pragma once

#include "paged_mainloop.cuh"

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

// Keys of a tile, as FlashInfer chooses them for contiguous sequences.
constexpr int hopper_keys(int head_dim) {
    return head_dim > 128 ? 64 : 128;
}

// False where the driver refuses.
template <typename T, int HEAD_DIM>
bool describe(PagedKv& kv, const fasa_pool& pool) {
    const int64_t block_rows = int64_t(pool.heads_per_block) * pool.tokens_per_block;
    kv.offsets = pool.offsets;
    for (kv.block_shift = 0; 1 << kv.block_shift < pool.tokens_per_block; ++kv.block_shift) {
    }
    kv.block_rows = static_cast<int32_t>(block_rows);
    kv.piece_rows = std::min(pool.tokens_per_block, hopper_keys(HEAD_DIM));
    kv.block_elements = block_rows * HEAD_DIM;
    kv.values = static_cast<const T*>(pool.primary) + kv.block_elements;
    // How many rows there are is not known, nor needed: offsets name rows that exist.
    const cuuint64_t shape[] = {HEAD_DIM, cuuint64_t(1) << 31}, stride[] = {HEAD_DIM * sizeof(T)};
    const cuuint32_t box[] = {kSlab, cuuint32_t(kv.piece_rows)}, step[] = {1, 1};
    return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
               &kv.rows,
               std::is_same_v<T, cutlass::half_t> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
               2, pool.primary, shape, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int HEAD_DIM, typename Scalar>
fasa_status launch_prefill_hopper(const fasa_prefill_params& p, const PrefillTile* tiles, int num_tiles,
                                  cudaStream_t stream) {
    using namespace flashinfer;
    using T = std::conditional_t<std::is_same_v<Scalar, __half>, cutlass::half_t, cutlass::bfloat16_t>;
    using Traits = AttentionKernelTraits<true, HEAD_DIM, HEAD_DIM, hopper_rows(HEAD_DIM),
                                         hopper_keys(HEAD_DIM), 2, T, T, T, int32_t, StandardAttention>;
    using Mainloop = PagedMainloop<Traits, HopperScale>;
    using Epilogue = CollectiveEpilogue<Traits>;
    const auto queries = get_gmem_layout(p.num_tokens, p.num_q_heads, HEAD_DIM, p.q_token_stride, HEAD_DIM);
    typename Mainloop::Params mainloop{
        queries,
        make_tma_copy(cute::SM90_TMA_LOAD{},
                      make_tensor(cute::make_gmem_ptr(static_cast<const T*>(p.q)), queries),
                      typename Mainloop::SmemLayoutQ{},
                      cute::select<0, 2>(typename Mainloop::TileShape_QKD{}), cute::_1{}),
        {},
        -1,
        {p.scale}};
    if (!describe<T, HEAD_DIM>(mainloop.kv, p.pool)) {
        return FASA_LAUNCH_FAILED;
    }
    const typename Epilogue::Params epilogue = Epilogue::to_underlying_arguments(
        {static_cast<T*>(p.out),
         get_gmem_layout(p.num_tokens, p.num_q_heads, HEAD_DIM, int64_t(p.num_q_heads) * HEAD_DIM, HEAD_DIM),
         nullptr, get_lse_gmem_layout(p.num_tokens, p.num_q_heads)});
    const ListedTile::Params listed = {tiles, p.lengths, 2 * p.pool.max_blocks,
                                       cutlass::FastDivmod(p.num_q_heads / p.pool.num_kv_heads)};
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
