// Selection and attention in one kernel: one block of threads for each (sequence, token set).
#pragma once

#include <algorithm>

#include "attend.cuh"
#include "launch.cuh"
#include "select.cuh"

namespace fasa {

// Dynamic shared memory of the second kernel: the chosen tokens stay, the lists and the merge take turns
// behind them.
template <int HEAD_DIM, int GROUP>
size_t shared_bytes(int budget) {
    const size_t lists = sizeof(SelectScratch) + sizeof(int) * candidate_capacity(budget);
    return sizeof(int) * ((budget + 3) / 4 * 4) + std::max(lists, sizeof(AttendScratch<HEAD_DIM, GROUP>));
}

template <typename T, int HEAD_DIM, int GROUP>
__global__ void __launch_bounds__(kSelectThreads)
    select_and_attend(const __grid_constant__ fasa_decode_params p, const Scores scores, int sets) {
    extern __shared__ __align__(16) char shared[];
    auto* chosen = reinterpret_cast<int*>(shared);
    char* rest = shared + sizeof(int) * ((p.budget + 3) / 4 * 4);
    auto& scratch = *reinterpret_cast<SelectScratch*>(rest);
    auto* octet_list = reinterpret_cast<int*>(rest + sizeof(SelectScratch));
    const int seq = blockIdx.y, set = blockIdx.x;
    const int per_kv_head = sets / p.pool.num_kv_heads;
    const int kv_head = set / per_kv_head;
    wait_for_previous();
    const int length = p.lengths[seq];
    const bool whole = length <= p.budget;
    if (!whole) {
        const int64_t row = static_cast<int64_t>(seq) * sets + set;
        Rescorer<T> rescore{p, scratch.rescore, seq, set, kv_head};
        rescore.prepare(scores, row);
        select_tokens<T>(scores, p, row, length, rescore, scratch, octet_list, chosen);
    }
    const int group = p.num_q_heads / sets;
    const int64_t first =
        (static_cast<int64_t>(seq) * p.num_q_heads + static_cast<int64_t>(set) * group) * HEAD_DIM;
    attend<T, HEAD_DIM, GROUP>(p, seq, kv_head, group, static_cast<const T*>(p.q) + first,
                               static_cast<T*>(p.out) + first, whole ? nullptr : chosen,
                               whole ? length : p.budget,
                               *reinterpret_cast<AttendScratch<HEAD_DIM, GROUP>*>(rest));
}

template <typename T, int HEAD_DIM, int GROUP>
fasa_status launch_attend_of(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    const auto kernel = select_and_attend<T, HEAD_DIM, GROUP>;
    const size_t bytes = shared_bytes<HEAD_DIM, GROUP>(p.budget);
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))) {
        return FASA_LAUNCH_FAILED;
    }
    const int sets = token_sets(p);
    return launch_overlapped(kernel, dim3(sets, p.num_seqs), kSelectThreads, bytes, stream, p, scores, sets);
}

template <typename T, int HEAD_DIM>
fasa_status launch_group(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    const int group = p.num_q_heads / token_sets(p);
    if (group == 1) return launch_attend_of<T, HEAD_DIM, 1>(p, scores, stream);
    if (group <= 4) return launch_attend_of<T, HEAD_DIM, 4>(p, scores, stream);
    if (group <= 8) return launch_attend_of<T, HEAD_DIM, 8>(p, scores, stream);
    return launch_attend_of<T, HEAD_DIM, 16>(p, scores, stream);
}

template <int HEAD_DIM>
fasa_status launch_attend(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    return p.pool.dtype == FASA_FLOAT16 ? launch_group<__half, HEAD_DIM>(p, scores, stream)
                                        : launch_group<__nv_bfloat16, HEAD_DIM>(p, scores, stream);
}

}  // namespace fasa
