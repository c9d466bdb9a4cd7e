// fasa_prefill: checks its parameters, lists the tiles of the batch, whose lengths only the device knows, and
// launches them. What is a host-side plan in FlashInfer is list_tiles here.
#include "dense.cuh"
#include "head_dims.cuh"
#include "launch.cuh"

namespace fasa {
namespace {

constexpr int kPlanThreads = 1024;

bool valid(const fasa_prefill_params& p) {
    constexpr int64_t kMost = int64_t(1) << 32;  // FlashInfer computes offsets in q and out with 32 bits
    return dense_valid(p) && p.num_tokens >= 1 && p.q_token_stride >= 1 && p.q_token_stride % 8 == 0 &&
           p.q_token_stride * p.num_tokens < kMost &&
           int64_t(p.num_tokens) * p.num_q_heads * p.pool.head_dim < kMost;
}

// The kernels for compute capability 9.0 do not share keys between the heads of a group, so they want tiles
// that are full of query tokens. They take the place of a sequence's key offsets as 32 bits.
bool on_hopper(const fasa_prefill_params& p) {
#if FASA_HAS_HOPPER
    const int64_t offsets = int64_t(p.num_seqs) * 2 * p.pool.max_blocks;
    return p.pool.head_dim != 96 && p.softcap <= 0.f && p.window == 0 && p.num_tokens / p.num_seqs >= 128 &&
           offsets < int64_t(1) << 31;
#else
    return false;
#endif
}

// Rows of a tile and, where a query token has several, how many.
struct Tiling {
    int rows, rows_of_token;
};

Tiling tiling(const fasa_prefill_params& p) {
    const int head_dim = p.pool.head_dim;
    return on_hopper(p) ? Tiling{hopper_rows(head_dim), 1}
                        : Tiling{prefill_rows(head_dim), p.num_q_heads / p.pool.num_kv_heads};
}

int most_tiles(const fasa_prefill_params& p) {
    const int64_t rows = int64_t(p.num_tokens) * tiling(p).rows_of_token;
    const int64_t begun =
        p.num_seqs < p.num_tokens ? p.num_seqs : p.num_tokens;  // one a sequence is not full
    return static_cast<int>(rows / tiling(p).rows + begun);
}

// The sum of `x` over the threads before this one. `shared`: a word for each warp.
__device__ int sum_before(int x, int* shared, int* all) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int sum = x;
    for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        sum += lane >= step ? other : 0;
    }
    __syncthreads();
    if (lane == kWarp - 1) {
        shared[warp] = sum;
    }
    __syncthreads();
    int before = sum - x;
    *all = 0;
    for (int i = 0; i < kPlanThreads / kWarp; ++i) {
        before += i < warp ? shared[i] : 0;
        *all += shared[i];
    }
    return before;
}

__device__ inline int tiles_of(int queries, Tiling tiling) {
    return (queries * tiling.rows_of_token + tiling.rows - 1) / tiling.rows;
}

// Lists the tiles of all sequences; a sequence's last tile comes first, for it sees the most tokens and takes
// the longest. One block of threads: a thread for each sequence counts, then a warp for each writes.
__global__ __launch_bounds__(kPlanThreads) void list_tiles(const int32_t* query_lengths, int num_seqs,
                                                           int num_tokens, Tiling tiling, PrefillTile* tiles,
                                                           int most) {
    __shared__ int shared[kPlanThreads / kWarp];
    __shared__ int queries[kPlanThreads], tokens[kPlanThreads], starts[kPlanThreads];
    wait_for_previous();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int first_token = 0, first_tile = 0;
    for (int base = 0; base < num_seqs; base += kPlanThreads) {
        const int seq = base + threadIdx.x;
        const int mine = seq < num_seqs ? max(query_lengths[seq], 0) : 0;
        int all_tokens, all_tiles;
        const int token = first_token + sum_before(mine, shared, &all_tokens);
        const int tile = first_tile + sum_before(tiles_of(mine, tiling), shared, &all_tiles);
        queries[threadIdx.x] = mine;
        tokens[threadIdx.x] = token;
        starts[threadIdx.x] = tile;
        __syncthreads();
        for (int i = warp; i < kPlanThreads && base + i < num_seqs; i += kPlanThreads / kWarp) {
            const int count = tiles_of(queries[i], tiling);
            const int named =
                tokens[i] + queries[i] <= num_tokens ? base + i : -1;  // -1: beyond the caller's bound
            for (int j = lane; j < count && starts[i] + j < most; j += kWarp) {
                tiles[starts[i] + j] = {named, count - 1 - j, tokens[i], queries[i]};
            }
        }
        first_token += all_tokens;
        first_tile += all_tiles;
        __syncthreads();
    }
    for (int i = first_tile + threadIdx.x; i < most; i += kPlanThreads) {
        tiles[i] = {-1, 0, 0, 0};
    }
}

}  // namespace
}  // namespace fasa

extern "C" size_t fasa_prefill_workspace(const fasa_prefill_params* params) {
    return params != nullptr && fasa::valid(*params) ? fasa::most_tiles(*params) * sizeof(fasa::PrefillTile)
                                                     : 0;
}

extern "C" fasa_status fasa_prefill(const fasa_prefill_params* params, void* stream) {
    using namespace fasa;
    if (params == nullptr || !valid(*params)) {
        return FASA_BAD_ARGUMENT;
    }
    const fasa_prefill_params p = completed(*params);
    if (p.workspace == nullptr || p.workspace_bytes < fasa_prefill_workspace(params)) {
        return FASA_SMALL_WORKSPACE;
    }
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    PrefillTile* tiles = static_cast<PrefillTile*>(p.workspace);
    const int most = most_tiles(p);
    return with_head_dim(p.pool.head_dim, [&](auto head_dim) {
        const fasa_status listed =
            launch_overlapped(list_tiles, dim3(1), kPlanThreads, 0, on, p.query_lengths, p.num_seqs,
                              p.num_tokens, tiling(p), tiles, most);
        if (listed != FASA_OK) {
            return listed;
        }
#if FASA_HAS_HOPPER
        if constexpr (head_dim() != 96) {
            if (on_hopper(p)) {
                return p.pool.dtype == FASA_FLOAT16
                           ? launch_prefill_hopper<head_dim(), __half>(p, tiles, most, on)
                           : launch_prefill_hopper<head_dim(), __nv_bfloat16>(p, tiles, most, on);
            }
        }
#endif
        return launch_prefill<head_dim()>(p, tiles, most, on);
    });
}
