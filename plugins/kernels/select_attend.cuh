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
// tokens and share the attention to them.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_and_attend(const __grid_constant__ fasa_decode_params p, const __grid_constant__ Scores scores,
                      const __grid_constant__ Partials partials, int sets, int peers) {
    extern __shared__ __align__(16) char shared[];
    auto* chosen = reinterpret_cast<int*>(shared);
    char* select = shared + ints_bytes(p.budget);
    char* merge = select + (peers > 1 ? selection_bytes(p.budget) : 0);
    const int seq = blockIdx.y, set = blockIdx.x / peers, rank = blockIdx.x % peers;
    const int per_kv_head = sets / p.pool.num_kv_heads;
    const int kv_head = set / per_kv_head;
    allow_next();
    if (peers > 1) {
        cluster_arrive();  // this block's shared memory can be written to
    }
    auto& scratch = *reinterpret_cast<SelectScratch*>(select);
    prepare(scratch);
    // Before the wait: see wait_and_allow_next().
    const int length = p.lengths[seq];
    wait_for_previous();
    if (length <= p.budget) {  // nothing to select; one block of threads does it for all sets of the KV head
        if (peers > 1) {
            cluster_wait();
        }
        if (set % per_kv_head == 0 && rank == 0) {
            __syncthreads();  // prepare() is done
            attend_all<T, HEAD_DIM>(p, partials, seq, kv_head, length,
                                    *reinterpret_cast<CrewsScratch<HEAD_DIM>*>(merge));
        }
        return;
    }
    const int64_t row = static_cast<int64_t>(seq) * sets + set;
    const int heads = by_softmax(p.reduction) ? p.num_q_heads / sets : 1;
    const Rescorer<T> rescore{p, scores, seq, kv_head, row * heads, heads};
    const bool selected = select_tokens<T>(scores, p, row, length, rescore, scratch,
                                           reinterpret_cast<int*>(select + sizeof(SelectScratch)), chosen);
    Crew<kSelectWarps> crew{0, peers, rank};
    if (peers > 1) {
        cluster_wait();
    }
    if (!selected) {
        if (peers > 1) {
            crew.sync();  // all know, and have read the keys
            if (rank > 0) {
                return;
            }
            crew.peers = 1;
        }
        select_slowly<T>(scores, p, row, length, rescore, scratch.block, chosen);
    }
    const int group = p.num_q_heads / sets;
    attend_chunk<T, HEAD_DIM>(
        p, partials, seq, kv_head, set * group, group, 0, true, [&](int i) { return chosen[i]; }, p.budget,
        crew, *reinterpret_cast<AttendScratch<HEAD_DIM, kSelectWarps>*>(merge));
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
                            partials, sets, peers);
}

template <int HEAD_DIM>
fasa_status launch_attend(const fasa_decode_params& p, const Scores& scores, const Partials& partials,
                          cudaStream_t stream) {
    return p.pool.dtype == FASA_FLOAT16
               ? launch_attend_of<__half, HEAD_DIM>(p, scores, partials, stream)
               : launch_attend_of<__nv_bfloat16, HEAD_DIM>(p, scores, partials, stream);
}

}  // namespace fasa
