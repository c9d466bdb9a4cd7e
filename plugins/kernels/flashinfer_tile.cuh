// One tile of FlashInfer's attention, without its host-side plan: every block of threads describes its own
// work as a batch of one sequence, from lengths in device memory. So there is nothing to plan, and a captured
// graph follows the lengths of each replay.
#pragma once

#include "launch.cuh"

#if FASA_HEAD_DIM % 64
#include "flashinfer_padded.cuh"
#endif
#include <flashinfer/attention/default_prefill_params.cuh>
#include <flashinfer/attention/prefill.cuh>

namespace fasa {

using flashinfer::MaskMode;

// What FlashInfer wants to know of a batch; of ours, sequence 0 is the only one.
template <typename T, typename Out>
struct TileParams : flashinfer::BatchPrefillPagedParams<T, T, Out, int32_t> {
    uint32_t query_tokens, cached_tokens;

    __host__ __device__ uint32_t get_qo_len(uint32_t) const { return query_tokens; }
    __host__ __device__ uint32_t get_kv_len(uint32_t) const { return cached_tokens; }
};

// Softcap and window are run-time values, to compile less; CAN_CAP false takes the softcap out of the inner
// loop. FlashInfer's own softcap is tanh.approx, whose 11 bits are too few for logits: exp2 and a reciprocal
// have 22.
template <bool CAN_CAP>
struct Attention : flashinfer::AttentionVariantBase {
    uint32_t qo_len, kv_len, window_left;
    float sm_scale_log2, before_tanh;

    template <typename Params>
    __device__ Attention(const Params& params, uint32_t, uint8_t*)
        : qo_len(params.get_qo_len(0)), kv_len(params.get_kv_len(0)) {
        const float cap = CAN_CAP ? params.logits_soft_cap : 0.f;
        window_left = params.window_left >= 0 ? params.window_left : kv_len;
        before_tanh = cap > 0.f ? params.sm_scale / cap * (2.f * flashinfer::math::log2e) : 0.f;
        sm_scale_log2 = (cap > 0.f ? cap : params.sm_scale) * flashinfer::math::log2e;
    }

    template <typename Params, typename L>
    __device__ L LogitsTransform(const Params&, L logit, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t) {
        if (CAN_CAP && before_tanh != 0.f) {  // tanh(x) = 1 - 2 / (exp(2x) + 1)
            return 1.f -
                   2.f * flashinfer::math::ptx_rcp(flashinfer::math::ptx_exp2(logit * before_tanh) + 1.f);
        }
        return logit;
    }

    template <typename Params>
    __device__ bool LogitsMask(const Params&, uint32_t, uint32_t query, uint32_t key, uint32_t, uint32_t) {
        return key + qo_len + window_left >= kv_len + query;
    }
};

// Shared memory of a multiprocessor, the smallest of the architectures compiled for.
constexpr int shared_memory() {
    int least = 228;
    for (const int architecture : {__CUDA_ARCH_LIST__}) {
        const int major = architecture / 100, minor = architecture / 10 % 10;
        const int kib = major == 9 || major == 10                  ? 228
                        : major == 8 && (minor == 0 || minor == 7) ? 164
                                                                   : 100;
        least = kib < least ? kib : least;
    }
    return least << 10;
}

// As FlashInfer's dispatcher chooses, but when compiling: rows of keys in a tile, so that two blocks of
// threads fit on a multiprocessor.
template <int ROWS, int HEAD_DIM, MaskMode MASK, typename T, typename Out, typename Variant>
struct TileTraits {
    static constexpr int kWidth = (HEAD_DIM + 63) / 64 * 64;  // of a row in shared memory
    static constexpr int kMmaQ = flashinfer::get_num_mma_q(ROWS);
    static constexpr int kWarpsQ = flashinfer::get_num_warps_q(ROWS);
    static constexpr int kWarpsKv = flashinfer::get_num_warps_kv(ROWS);

    static constexpr int mma_kv() {
        const int queries = ROWS * kWidth * 2, each = 2 * kWidth * 16 * kWarpsKv * 2;
        const int blocks = shared_memory() >= 2 * (queries + each) ? 2 : 1;
        const int room =
            shared_memory() / blocks - (blocks == 1 ? 1024 : 0);  // the system keeps 1 KiB a block
        const int most = (room - queries) / each < 8 / kMmaQ ? (room - queries) / each : 8 / kMmaQ;
        return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
    }

    using Base =
        flashinfer::KernelTraits<MASK, ROWS, kMmaQ, mma_kv(), kWidth / 16, kWidth / 16, kWarpsQ, kWarpsKv,
                                 flashinfer::PosEncodingMode::kNone, T, T, Out, float, int32_t, Variant>;
    static_assert(!Base::IsInvalid());

    struct type : Base {
        // Rows of the output; the float32 ones, partial results, are as wide as the tile.
        static constexpr uint32_t HEAD_DIM_VO = sizeof(Out) == 4 ? kWidth : HEAD_DIM;
    };
};

template <typename T, typename Out>
TileParams<T, Out> tile_params(const fasa_pool& pool, int num_q_heads, float scale, float softcap,
                               int window) {
    TileParams<T, Out> params;
    T* keys = static_cast<T*>(pool.primary);
    T* values = keys + static_cast<size_t>(pool.tokens_per_block) * pool.heads_per_block * pool.head_dim;
    params.paged_kv = flashinfer::paged_kv_t<T, int32_t>(
        pool.heads_per_block, pool.tokens_per_block, pool.head_dim, 1, flashinfer::QKVLayout::kHND, keys,
        values, const_cast<int32_t*>(pool.offsets), nullptr, nullptr);
    params.group_size = flashinfer::uint_fastdiv(num_q_heads / pool.num_kv_heads);
    params.num_qo_heads = num_q_heads;
    params.q_stride_h = pool.head_dim;
    params.sm_scale = scale;
    params.logits_soft_cap = softcap;
    params.window_left = window > 0 ? window - 1 : -1;
    return params;
}

// Attends with tile `q_tile` of the queries at params.q to chunk `chunk` of the keys of sequence `seq`, or to
// all of them where SPLIT is false. The caller has set q, o, lse, query_tokens and cached_tokens for this
// sequence.
template <typename Traits, bool SPLIT, typename Params>
__device__ __forceinline__ void attend_tile(Params params, int max_blocks, int seq, int q_tile, int chunk,
                                            int chunk_tokens) {
    extern __shared__ __align__(128) uint8_t tile_memory[];
    const int page_size = static_cast<uint32_t>(params.paged_kv.page_size);
    int32_t first[2] = {0, 1};
    int32_t pages[2] = {0, (static_cast<int32_t>(params.cached_tokens) + page_size - 1) / page_size};
    int32_t q_tiles[1] = {q_tile}, chunks[1] = {chunk}, tokens[1] = {chunk_tokens};
    params.paged_kv.indices +=
        static_cast<int64_t>(seq) * 2 * max_blocks;  // the value offset is the key's plus 1
    params.paged_kv.indptr = pages;
    params.paged_kv.batch_size = 1;  // known here, or the arrays would be indexed at run time
    params.q_indptr = params.o_indptr = params.request_indices = first;
    params.qo_tile_indices = q_tiles;
    params.kv_tile_indices = chunks;
    params.kv_chunk_size_ptr = tokens;
    params.partition_kv = SPLIT;
    const uint32_t warp = threadIdx.x / kWarp;
    const dim3 thread(threadIdx.x % kWarp, warp % Traits::NUM_WARPS_Q, warp / Traits::NUM_WARPS_Q);
    flashinfer::BatchPrefillWithPagedKVCacheDevice<Traits>(
        params, reinterpret_cast<typename Traits::SharedStoragePaged&>(tile_memory), thread, 0, blockIdx.y,
        gridDim.y);
}

// The kernels above read what the previous kernel wrote only after wait_for_previous().
template <typename Traits, typename Task>
fasa_status launch_tiles(void (*kernel)(Task), dim3 grid, const Task& task, cudaStream_t stream) {
    constexpr size_t kShared = sizeof(typename Traits::SharedStoragePaged);
    return launch_overlapped(kernel, grid, Traits::NUM_THREADS, kShared, stream, task);
}

}  // namespace fasa
