// The producer of a Hopper prefill: what FlashInfer's CollectiveMainloop does for contiguous sequences
// (queries, keys and values by TMA, one warp), for the paged pool.
//
// Idea: all rows of the pool, keys and values of all blocks and heads, are rows of one two-dimensional
// tensor, so one descriptor serves every block: a piece of a tile is a box of as many rows as a block and a
// tile have in common, found by its row number. FlashInfer's own mainloop for pages copies 16 bytes a thread
// and instruction (cp.async) and spends a warp group on that.
#pragma once

// Instead of FlashInfer's cutlass_utils.cuh, which includes all of CUTLASS and cuRAND for nothing used here.
#define FLASHINFER_CUTLASS_UTILS_CUH_
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
#include <flashinfer/attention/hopper/variants.cuh>

#include "dense.cuh"
#include "launch.cuh"

namespace fasa {

// 128 bytes of each row are swizzled together, so a row takes HEAD_DIM / kSlab boxes.
constexpr int kSlab = 64;

struct PagedKv {
    CUtensorMap rows;  // [any, HEAD_DIM] from pool.primary on
    const int32_t* offsets;
    int32_t block_shift;     // log2 of tokens_per_block
    int32_t block_rows;      // in the pool: of keys or of values
    int32_t piece_rows;      // of a box: a power of two, at least 8
    const void* values;      // of block 0, and
    int64_t block_elements;  // from one block's values to the next's
};

template <typename Traits, typename Scale>
struct PagedMainloop {
    using DTypeQ = typename Traits::DTypeQ;
    using DTypeKV = typename Traits::DTypeKV;
    using TileShape_QKD = typename Traits::TileShape_QKD;
    using SmemLayoutQ = typename Traits::SmemLayoutQ;
    using SmemLayoutK = typename Traits::SmemLayoutK;
    using SmemLayoutV = typename Traits::SmemLayoutV;
    using MainloopPipeline = typename Traits::MainloopPipeline;
    using PipelineParams = typename MainloopPipeline::Params;
    using PipelineState = typename MainloopPipeline::PipelineState;
    using LayoutT = cute::Layout<cute::Shape<int32_t, int32_t, int32_t>,
                                 cute::Shape<int64_t, cute::_1, int64_t>>;  // (N, D, H)
    using TMA_Q = decltype(make_tma_copy(
        cute::SM90_TMA_LOAD{},
        make_tensor(cute::make_gmem_ptr(static_cast<DTypeQ const*>(nullptr)), LayoutT{}), SmemLayoutQ{},
        cute::select<0, 2>(TileShape_QKD{}), cute::_1{}));

    static constexpr int kQueries = cute::get<0>(TileShape_QKD{}), kKeys = cute::get<1>(TileShape_QKD{});
    static constexpr int kHeadDim = cute::get<2>(TileShape_QKD{});
    static constexpr bool USE_TMA_LOAD_KV = true;
    static constexpr uint32_t kRowBytes = kHeadDim * sizeof(DTypeKV);
    static constexpr uint32_t TmaTransactionBytesQ = kQueries * kRowBytes;
    static constexpr uint32_t TmaTransactionBytesK = kKeys * kRowBytes;
    static constexpr uint32_t TmaTransactionBytesV = TmaTransactionBytesK;
    using WarpScheduler = flashinfer::WarpScheduler<Traits, (kHeadDim <= 128)>;

    struct Params {
        LayoutT layout_Q;
        TMA_Q tma_load_Q;
        PagedKv kv;
        int window_left;
        Scale additional_params;
    };

    CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& p) {
        cute::prefetch_tma_descriptor(p.tma_load_Q.get_tma_descriptor());
        cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.kv.rows));
    }

    CUTLASS_DEVICE int get_num_kv_tiles(const Params&, int q_tile, int queries, int length) {
        const int seen = min(length, (q_tile + 1) * kQueries + length - queries);
        return (seen + kKeys - 1) / kKeys;
    }

    // One warp. Tiles of keys and values from the last to the first; keys are a tile ahead.
    template <bool LEFT_SLIDING_WINDOW, typename BlockCoord, typename Scheduler, typename SharedStorage>
    CUTLASS_DEVICE void load(const Params& p, MainloopPipeline pipeline_k, MainloopPipeline pipeline_v,
                             PipelineState& write_k, PipelineState& write_v, SharedStorage& storage,
                             Scheduler&, const typename Scheduler::Params&, typename Scheduler::WorkTileInfo&,
                             const BlockCoord& coord, int work) {
        using namespace cute;
        const auto [q_tile, q_head, kv_head, first_query, offsets_row, queries, length, seq] = coord;
        const int lane = threadIdx.x % kWarp;
        const int32_t* offsets = p.kv.offsets + offsets_row;
        Tensor sQ = make_tensor(make_smem_ptr(storage.smem_q.data()), SmemLayoutQ{});
        Tensor sK = make_tensor(make_smem_ptr(storage.smem_k.data()), SmemLayoutK{});
        Tensor sV = make_tensor(make_smem_ptr(storage.smem_v.data()), SmemLayoutV{});
        const int pieces = kKeys / p.kv.piece_rows;
        // Lane i finds the first row of a tile's i-th piece of keys; its values lie a block further. Pieces
        // beyond the end repeat the last one: what is read there is masked.
        const auto find_rows = [&](int tile) {
            const int token =
                min(tile * kKeys + lane % pieces * p.kv.piece_rows, (length - 1) & ~(p.kv.piece_rows - 1));
            const int in_block = token & ((1 << p.kv.block_shift) - 1);
            return offsets[token >> p.kv.block_shift] * p.kv.block_rows + (kv_head << p.kv.block_shift) +
                   in_block;
        };
        const auto copy_pieces = [&](const auto& tensor, int stage, uint64_t* barrier, int rows, int count) {
            for (int i = 0; i < count; ++i) {
                const int row = __shfl_sync(0xffffffff, rows, i);
                if (lane == 0) {
#pragma unroll
                    for (int d = 0; d < kHeadDim; d += kSlab) {
                        SM90_TMA_LOAD_2D::copy(
                            &p.kv.rows, barrier, static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL),
                            raw_pointer_cast(&tensor(i * p.kv.piece_rows, d, stage)), d, row);
                    }
                }
            }
        };
        const auto load_keys = [&](int rows) {
            pipeline_k.producer_acquire(write_k);
            copy_pieces(sK, write_k.index(), pipeline_k.producer_get_barrier(write_k), rows, pieces);
            ++write_k;
        };
        const auto load_values = [&](int rows, int count) {
            pipeline_v.producer_acquire(write_v);
            uint64_t* barrier = pipeline_v.producer_get_barrier(write_v);
            copy_pieces(sV, write_v.index(), barrier, rows + p.kv.block_rows, count);
            if (count < pieces && lane == 0) {
                cutlass::arch::ClusterTransactionBarrier::complete_transaction(
                    barrier, 0, (pieces - count) * p.kv.piece_rows * kRowBytes);
            }
            ++write_v;
        };

        int tile = get_num_kv_tiles(p, q_tile, queries, length) - 1;
        int rows = find_rows(tile);
        load_keys(rows);
        // Wait for the consumers to say that the queries' place is free.
        cutlass::arch::NamedBarrier::sync(Traits::NUM_MMA_THREADS + Traits::NUM_PRODUCER_THREADS,
                                          static_cast<int>(flashinfer::NamedBarriers::kQueryEmpty));
        if (lane == 0) {
            Tensor mQ = p.tma_load_Q.get_tma_tensor(p.layout_Q.shape());
            Tensor gQ = flashinfer::get_local_tile_tensor(mQ, select<0, 2>(TileShape_QKD{}), q_head,
                                                          first_query, queries)(_, _, q_tile);
            Tensor sQ_x = make_tensor(sQ.data(), make_layout(sQ.layout(), Layout<_1>{}));
            Tensor gQ_x = make_tensor(gQ.data(), make_layout(gQ.layout(), Layout<_1>{}));
            auto [tQgQ, tQsQ] = tma_partition(p.tma_load_Q, _0{}, Layout<_1>{}, group_modes<0, 2>(sQ_x),
                                              group_modes<0, 2>(gQ_x));
            storage.barrier_Q.arrive_and_expect_tx(TmaTransactionBytesQ);
            copy(p.tma_load_Q.with(reinterpret_cast<cutlass::arch::ClusterTransactionBarrier::ValueType&>(
                                       storage.barrier_Q),
                                   0),
                 tQgQ, tQsQ);
        }
        storage.barrier_O.wait((work + 1) % 2);  // the output takes the place of the values

        // Rows past the end hold anything, NaN too, which no weight of 0 removes: those of the sequence's
        // last values are written by hand. It is the first tile that is loaded, so its place is free.
        int count = min(pieces, (length - tile * kKeys) / p.kv.piece_rows);
        if (count < pieces) {
            constexpr int kParts = kHeadDim / 8;
            const int begin = count * p.kv.piece_rows;
            const auto* values = static_cast<const DTypeKV*>(p.kv.values) +
                                 (static_cast<int64_t>(kv_head) << p.kv.block_shift) * kHeadDim;
            for (int i = lane; i < (kKeys - begin) * kParts; i += kWarp) {
                const int row = begin + i / kParts, part = i % kParts * 8, token = tile * kKeys + row;
                const int in_block = token & ((1 << p.kv.block_shift) - 1);
                uint4 x{0, 0, 0, 0};
                if (token < length) {
                    x = *reinterpret_cast<const uint4*>(
                        values + offsets[token >> p.kv.block_shift] * p.kv.block_elements +
                        in_block * kHeadDim + part);
                }
                *reinterpret_cast<uint4*>(raw_pointer_cast(&sV(row, part, write_v.index()))) = x;
            }
            cutlass::arch::fence_view_async_shared();
            __syncwarp();
        }
        for (; tile > 0; --tile) {
            const int next = find_rows(tile - 1);
            load_keys(next);
            load_values(rows, count);
            rows = next, count = pieces;
        }
        load_values(rows, count);
    }

    CUTLASS_DEVICE void load_tail(MainloopPipeline pipeline_k, MainloopPipeline pipeline_v,
                                  PipelineState& write_k, PipelineState& write_v) {
        if (threadIdx.x == 0) {
            pipeline_k.producer_tail(write_k);
            pipeline_v.producer_tail(write_v);
        }
    }
};

}  // namespace fasa
