// What the translation units of fasa_decode offer each other: one a head_dim keeps compile time apart.
#pragma once

#include "common.cuh"

namespace fasa {

inline int token_sets(const fasa_decode_params& p) {
    return p.reduction == FASA_REDUCE_PER_HEAD ? p.num_q_heads : p.pool.num_kv_heads;
}

inline fasa_status launched() {
    return cudaPeekAtLastError() == cudaSuccess ? FASA_OK : FASA_LAUNCH_FAILED;
}

// The score pass.
fasa_status launch_score(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream);

// Selection and attention, one block of threads for each (sequence, token set).
template <int HEAD_DIM>
fasa_status launch_attend(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream);

}  // namespace fasa
