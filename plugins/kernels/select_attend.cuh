// Selection and attention in one kernel: one block of threads for each (sequence, token set).
#pragma once

#include <algorithm>

#include "dense_decode.cuh"
#include "launch.cuh"
#include "select.cuh"

namespace fasa {

// Dynamic shared memory of the second kernel: the chosen tokens stay, selection and the merge take turns
// behind them.
template <int HEAD_DIM>
size_t shared_bytes(int budget) {
    return sizeof(int) * ((budget + 3) / 4 * 4) +
           std::max(sizeof(SelectScratch) + sizeof(int) * octet_capacity(budget),
                    sizeof(AttendScratch<HEAD_DIM>));
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_and_attend(const __grid_constant__ fasa_decode_params p, const __grid_constant__ Scores scores,
                      const __grid_constant__ Partials partials, int sets) {
    extern __shared__ __align__(16) char shared[];
    auto* chosen = reinterpret_cast<int*>(shared);
    char* rest = shared + sizeof(int) * ((p.budget + 3) / 4 * 4);
    const int seq = blockIdx.y, set = blockIdx.x;
    const int per_kv_head = sets / p.pool.num_kv_heads;
    const int kv_head = set / per_kv_head;
    allow_next();
    wait_for_previous();
    const int length = p.lengths[seq];
    if (length <= p.budget) {  // nothing to select; one block of threads does it for all sets of the KV head
        if (set % per_kv_head == 0) {
            attend_all<T, HEAD_DIM>(p, partials, seq, kv_head, length,
                                    *reinterpret_cast<AttendScratch<HEAD_DIM>*>(rest));
        }
        return;
    }
    const int64_t row = static_cast<int64_t>(seq) * sets + set;
    const int heads = by_softmax(p.reduction) ? p.num_q_heads / sets : 1;
    const Rescorer<T> rescore{p, scores, seq, kv_head, row * heads, heads};
    select_tokens<T>(scores, p, row, length, rescore, *reinterpret_cast<SelectScratch*>(rest),
                     reinterpret_cast<int*>(rest + sizeof(SelectScratch)), chosen);
    const int group = p.num_q_heads / sets;
    attend_chunk<T, HEAD_DIM>(
        p, partials, seq, kv_head, set * group, group, 0, true, [&](int i) { return chosen[i]; }, p.budget,
        *reinterpret_cast<AttendScratch<HEAD_DIM>*>(rest));
}

template <typename T, int HEAD_DIM>
fasa_status launch_attend_of(const fasa_decode_params& p, const Scores& scores, const Partials& partials,
                             cudaStream_t stream) {
    const int sets = token_sets(p);
    return launch_overlapped(select_and_attend<T, HEAD_DIM>, dim3(sets, p.num_seqs), kSelectThreads,
                             shared_bytes<HEAD_DIM>(p.budget), stream, p, scores, partials, sets);
}

template <int HEAD_DIM>
fasa_status launch_attend(const fasa_decode_params& p, const Scores& scores, const Partials& partials,
                          cudaStream_t stream) {
    return p.pool.dtype == FASA_FLOAT16
               ? launch_attend_of<__half, HEAD_DIM>(p, scores, partials, stream)
               : launch_attend_of<__nv_bfloat16, HEAD_DIM>(p, scores, partials, stream);
}

}  // namespace fasa
