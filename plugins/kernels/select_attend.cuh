// Selection and attention in one kernel: one block of threads for each (sequence, token set).
#pragma once

#include <algorithm>

#include "attend.cuh"
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
    select_and_attend(const __grid_constant__ fasa_decode_params p, const Scores scores, int sets) {
    extern __shared__ __align__(16) char shared[];
    auto* chosen = reinterpret_cast<int*>(shared);
    char* rest = shared + sizeof(int) * ((p.budget + 3) / 4 * 4);
    auto& scratch = *reinterpret_cast<SelectScratch*>(rest);
    const int seq = blockIdx.y, set = blockIdx.x;
    const int per_kv_head = sets / p.pool.num_kv_heads;
    const int kv_head = set / per_kv_head;
    allow_next();
    wait_for_previous();
    const int length = p.lengths[seq];
    if (length <= p.budget) {  // dense attention takes these rows
        return;
    }
    const int64_t row = static_cast<int64_t>(seq) * sets + set;
    const int heads = by_softmax(p.reduction) ? p.num_q_heads / sets : 1;
    const Rescorer<T> rescore{p, scores, seq, kv_head, row * heads, heads};
    select_tokens<T>(scores, p, row, length, rescore, scratch,
                     reinterpret_cast<int*>(rest + sizeof(SelectScratch)), chosen);
    const int group = p.num_q_heads / sets;
    for (int head = 0; head < group; head += kHeads) {  // larger groups come again for their other heads
        const int64_t first =
            (static_cast<int64_t>(seq) * p.num_q_heads + static_cast<int64_t>(set) * group + head) * HEAD_DIM;
        attend<T, HEAD_DIM>(p, seq, kv_head, min(kHeads, group - head), static_cast<const T*>(p.q) + first,
                            static_cast<T*>(p.out) + first, chosen, p.budget,
                            *reinterpret_cast<AttendScratch<HEAD_DIM>*>(rest));
    }
}

template <typename T, int HEAD_DIM>
fasa_status launch_attend_of(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    const auto kernel = select_and_attend<T, HEAD_DIM>;
    const size_t bytes = shared_bytes<HEAD_DIM>(p.budget);
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))) {
        return FASA_LAUNCH_FAILED;
    }
    const int sets = token_sets(p);
    return launch_overlapped(kernel, dim3(sets, p.num_seqs), kSelectThreads, bytes, stream, p, scores, sets);
}

template <int HEAD_DIM>
fasa_status launch_attend(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    return p.pool.dtype == FASA_FLOAT16 ? launch_attend_of<__half, HEAD_DIM>(p, scores, stream)
                                        : launch_attend_of<__nv_bfloat16, HEAD_DIM>(p, scores, stream);
}

}  // namespace fasa
