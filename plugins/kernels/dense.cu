// fasa_dense_decode: checks its parameters and splits the sequences into chunks.
#include "dense.cuh"
#include "head_dims.cuh"
#include "launch.cuh"

namespace fasa {
namespace {

constexpr int kLeastChunk = 128, kMostChunk = 4096;  // multiples of the first: what a block takes at a time
constexpr int kLeastForTwo = 1536;  // with fewer tokens, a second chunk costs more by the merge than it saves

bool valid(const fasa_decode_params& p) {
    return dense_valid(p) && p.max_length >= 1;
}

int chunk_tokens(const fasa_decode_params& p) {
    const int pieces = 2 * multiprocessors() / (p.num_seqs * p.pool.num_kv_heads);
    const int seen = seen_tokens(p.max_length, p.window);
    const bool whole = pieces < 2 || (pieces == 2 && seen < kLeastForTwo);
    const int each = whole ? seen : (seen + pieces - 1) / pieces;
    const int clamped = each > kMostChunk ? kMostChunk : each;
    return (clamped + kLeastChunk - 1) / kLeastChunk * kLeastChunk;
}

size_t partial_rows(const fasa_decode_params& p, const Partials& partials) {
    return partials.chunks > 1 ? static_cast<size_t>(p.num_seqs) * partials.chunks * p.num_q_heads : 0;
}

}  // namespace

Partials dense_partials(const fasa_decode_params& p, int longest, void* workspace) {
    Partials partials;
    partials.chunk_tokens = chunk_tokens(p);
    partials.chunks = chunks_of(longest, p.window, partials.chunk_tokens);
    partials.out = static_cast<float*>(workspace);
    partials.lse = partials.out + partial_rows(p, partials) * p.pool.head_dim;
    return partials;
}

size_t dense_workspace(const fasa_decode_params& p, int longest) {
    return partial_rows(p, dense_partials(p, longest, nullptr)) * (p.pool.head_dim + 1) * sizeof(float);
}

fasa_status launch_dense_decode(const fasa_decode_params& p, void* workspace, cudaStream_t stream) {
    return with_head_dim(p.pool.head_dim, [&](auto head_dim) {
        return launch_dense<head_dim()>(p, dense_partials(p, p.max_length, workspace), stream);
    });
}

}  // namespace fasa

extern "C" size_t fasa_dense_decode_workspace(const fasa_decode_params* params) {
    return params != nullptr && fasa::valid(*params) ? fasa::dense_workspace(*params, params->max_length) : 0;
}

extern "C" fasa_status fasa_dense_decode(const fasa_decode_params* params, void* stream) {
    using namespace fasa;
    if (params == nullptr || !valid(*params)) {
        return FASA_BAD_ARGUMENT;
    }
    const fasa_decode_params p = completed(*params);
    const size_t needed = dense_workspace(p, p.max_length);
    if (p.workspace_bytes < needed || (needed && p.workspace == nullptr)) {
        return FASA_SMALL_WORKSPACE;
    }
    return launch_dense_decode(p, p.workspace, static_cast<cudaStream_t>(stream));
}
