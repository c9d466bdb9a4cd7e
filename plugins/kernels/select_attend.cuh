// Selection and attention in one kernel: one block of threads for each (sequence, token set), or a cluster.
#pragma once

#include <algorithm>

#include "dense_decode.cuh"
#include "launch.cuh"
#include "select.cuh"
#include "select_slowly.cuh"

namespace fasa {

constexpr int kPeers = 4;  // blocks of threads of a cluster

// Of `count` ints in shared memory, so that what follows is aligned to 16 bytes.
__host__ __device__ inline size_t ints_bytes(int count) {
    return sizeof(int) * ((count + 3) / 4 * 4);
}

__host__ __device__ inline size_t selection_bytes(int budget) {
    return sizeof(SelectScratch) + ints_bytes(octet_capacity(budget));
}

// Dynamic shared memory of the second kernel: the chosen tokens stay, selection and the merge take turns
// behind them. In a cluster they do not: other blocks leave their results here while this one still selects.
template <int HEAD_DIM>
size_t shared_bytes(int budget, int peers) {
    const size_t select = selection_bytes(budget);
    const size_t merge =
        std::max(sizeof(AttendScratch<HEAD_DIM, kSelectWarps>), sizeof(CrewsScratch<HEAD_DIM>));
    return ints_bytes(budget) + (peers > 1 ? select + merge : std::max(select, merge));
}

// Grid: (token sets * peers, sequences), in clusters of `peers` blocks of threads, which select the same
// tokens and share the attention to them. A KV head has `per_kv_head` token sets, each for `group` query
// heads.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_and_attend(const __grid_constant__ fasa_decode_params p, const __grid_constant__ Scores scores,
                      const __grid_constant__ Partials partials, int peers, int group, int per_kv_head) {
    extern __shared__ __align__(16) char shared[];
    auto* chosen = reinterpret_cast<int*>(shared);
    char* select = shared + ints_bytes(p.budget);
    char* merge = select + (peers > 1 ? selection_bytes(p.budget) : 0);
    allow_next();
    Crew<kSelectWarps> crew{0, peers, static_cast<int>(blockIdx.x % peers)};
    auto& merging = *reinterpret_cast<AttendScratch<HEAD_DIM, kSelectWarps>*>(merge);
    if (peers > 1) {
        if (crew.merges() && threadIdx.x == 0) {
            merging.mailbox.open(merging.sent(peers));
        }
        cluster_arrive_relaxed();
    }
    // Before the wait: see wait_and_allow_next(). Nor do score kernels write the padding that prepare() does.
    const int seq = blockIdx.y, set = blockIdx.x / peers, kv_head = set / per_kv_head;
    const int length = p.lengths[seq];
    const int64_t row = static_cast<int64_t>(seq) * (p.pool.num_kv_heads * per_kv_head) + set;
    auto& scratch = *reinterpret_cast<SelectScratch*>(select);
    scratch.prepare(scores, row, length);
    __syncthreads();
    if (peers > 1) {
        cluster_wait();  // now all blocks' shared memory can be written to
    }
    wait_for_previous();
    if (length <= p.budget) {  // nothing to select; one block of threads does it for all sets of the KV head
        if (set % per_kv_head == 0 && crew.rank == 0) {
            attend_all<T, HEAD_DIM>(p, partials, seq, kv_head, length,
                                    *reinterpret_cast<CrewsScratch<HEAD_DIM>*>(merge));
        }
        return;
    }
    const int heads = by_softmax(p.reduction) ? group : 1;
    const Rescorer<T> rescore(p, scores, seq, kv_head, row * heads, heads);
    if (!select_tokens<T>(scores, p, row, length, rescore, scratch,
                          reinterpret_cast<int*>(select + sizeof(SelectScratch)), chosen)) {
        if (peers > 1) {
            crew.sync();  // all know, and have read the keys
            if (crew.rank > 0) {
                return;
            }
            crew.peers = 1;
        }
        select_slowly<T>(scores, p, row, length, rescore, scratch.threshold.block, chosen);
    }
    attend_chunk<T, HEAD_DIM>(
        p, partials, seq, kv_head, set * group, group, 0, true, [&](int i) { return chosen[i]; }, p.budget,
        crew, merging);
}

// Blocks of threads that share a row: several where the rows leave three quarters of the multiprocessors idle
// (a cluster's blocks must find their places at the same time).
template <int HEAD_DIM>
int peers_of(const fasa_decode_params& p, int rows) {
    const bool room = 2 * rows * kPeers <= multiprocessors();
    const bool fits = static_cast<int>(shared_bytes<HEAD_DIM>(p.budget, kPeers)) <=
                      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return room && fits && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? kPeers : 1;
}

template <typename T, int HEAD_DIM>
fasa_status launch_attend_of(const fasa_decode_params& p, const Scores& scores, const Partials& partials,
                             cudaStream_t stream) {
    const int sets = token_sets(p), peers = peers_of<HEAD_DIM>(p, sets * p.num_seqs);
    return launch_clustered(peers, select_and_attend<T, HEAD_DIM>, dim3(sets * peers, p.num_seqs),
                            kSelectThreads, shared_bytes<HEAD_DIM>(p.budget, peers), stream, p, scores,
                            partials, peers, p.num_q_heads / sets, sets / p.pool.num_kv_heads);
}

template <int HEAD_DIM>
fasa_status launch_attend(const fasa_decode_params& p, const Scores& scores, const Partials& partials,
                          cudaStream_t stream) {
    return p.pool.dtype == FASA_FLOAT16
               ? launch_attend_of<__half, HEAD_DIM>(p, scores, partials, stream)
               : launch_attend_of<__nv_bfloat16, HEAD_DIM>(p, scores, partials, stream);
}

}  // namespace fasa
