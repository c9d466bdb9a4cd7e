// Dense attention over the paged pool: what its translation units offer each other, and fasa_decode.
#pragma once

#include "common.cuh"

namespace fasa {

// Where the chunks of a sequence leave their results, to be merged.
struct Partials {
    float* out;  // [seqs, chunks, query heads, head_dim], normalised
    float* lse;  // [seqs, chunks, query heads]: log2 of the sum of exponentials
    int chunks;  // that the longest sequence has
    int chunk_tokens;
};

// Chunks as fasa_dense_decode makes them, of which the first of the sequences with at most `longest` tokens
// have room in `workspace`: dense_workspace() bytes, aligned to 256.
Partials dense_partials(const fasa_decode_params& p, int longest, void* workspace);
size_t dense_workspace(const fasa_decode_params& p, int longest);

fasa_status launch_dense_decode(const fasa_decode_params& p, void* workspace, cudaStream_t stream);

template <int HEAD_DIM>
fasa_status launch_dense(const fasa_decode_params& p, const Partials& partials, cudaStream_t stream);

// A block of threads' share of a prefill: a tile of one sequence's queries, or nothing.
struct PrefillTile {
    int32_t seq;  // -1 for nothing
    int32_t index;
    int32_t first_token;  // of the sequence's queries, in the packed batch
    int32_t query_tokens;
};

// Rows of (query token, head of the group) in a tile. A tile of 128 would need too many registers at 256.
constexpr int prefill_rows(int head_dim) {
    return head_dim > 128 ? 64 : 128;
}

template <int HEAD_DIM>
fasa_status launch_prefill(const fasa_prefill_params& p, const PrefillTile* tiles, int num_tiles,
                           cudaStream_t stream);

// The same for compute capability 9.0 (FASA_HAS_HOPPER); not for head_dim 96, a softcap or a window. A tile
// is of one query head.
constexpr int hopper_rows(int head_dim) {  // query tokens in a tile
    return head_dim == 64 ? 192 : 128;
}

template <int HEAD_DIM, typename T>
fasa_status launch_prefill_hopper(const fasa_prefill_params& p, const PrefillTile* tiles, int num_tiles,
                                  cudaStream_t stream);

// The tokens that the last query of a sequence sees.
__host__ __device__ inline int seen_tokens(int length, int window) {
    return window > 0 && window < length ? window : length;
}

// The chunks of dense decode that they make.
__host__ __device__ inline int chunks_of(int length, int window, int chunk_tokens) {
    return (seen_tokens(length, window) + chunk_tokens - 1) / chunk_tokens;
}

}  // namespace fasa
