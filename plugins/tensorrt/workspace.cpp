// How much workspace a layer needs on any GPU: an engine can be built on another one than it runs on, or on
// none.
#include <algorithm>

#include "../kernels/head_dims.cuh"
#include "step.h"

namespace fasa {
namespace {

constexpr int64_t kMostMultiprocessors = 256;  // of any GPU; the kernels split their work by this number

size_t round_up(int64_t bytes) {
    return static_cast<size_t>((bytes + 255) / 256 * 256);
}

fasa_decode_params largest(const LayerConfig& c, int32_t num_seqs, int32_t max_length) {
    fasa_decode_params p = {};
    p.num_seqs = num_seqs;
    p.num_q_heads = c.num_q_heads;
    p.max_length = max_length;
    p.budget = c.budget;
    p.sink = c.sink;
    p.recent = c.recent;
    p.scale = c.scale;
    p.pool.max_blocks = 1;
    p.pool.tokens_per_block = c.tokens_per_block;
    p.pool.num_kv_heads = c.num_kv_heads;
    p.pool.head_dim = c.head_dim;
    p.labels.kind = FASA_LABELS_PREFIX;
    p.labels.n_tip = c.n_tip;
    p.reduction = c.reduction == FASA_REDUCE_PER_HEAD ? FASA_REDUCE_PER_HEAD : FASA_REDUCE_SUM;
    return p;
}

// Dense decode leaves a partial result for each (sequence, chunk, query head). Its rule for chunks, in
// fasa.h, makes no more of them than are counted here, for any number of multiprocessors up to the most.
int64_t dense_decode(const LayerConfig& c) {
    constexpr int32_t kLongestChunk = 4096;
    constexpr int32_t kMany = 65535;  // sequences, so many that their chunks are the longest on every GPU
    const fasa_decode_params sample = largest(c, kMany, 2 * kLongestChunk);
    const int64_t each = fasa_dense_decode_workspace(&sample) / (int64_t(kMany) * 2 * c.num_q_heads);
    const int64_t seen = c.window > 0 ? std::min(c.window, c.max_seq_len) : c.max_seq_len;
    int64_t most = 0;
    for (int64_t seqs = 1; seqs <= c.max_batch_size; ++seqs) {
        const int64_t pieces = std::max<int64_t>(2 * kMostMultiprocessors / (seqs * c.num_kv_heads), 1);
        const int64_t chunks =
            std::min((seen + 127) / 128, std::max(pieces, (seen + kLongestChunk - 1) / kLongestChunk));
        most = std::max(most, seqs * chunks);
    }
    return most * c.num_q_heads * each;
}

// What selection needs beside dense attention. The softmax reductions leave a sum of 4 bytes for every
// (sequence, query head, block of threads); blocks for all sequences, or of prefix labels for
// all (sequence, KV head), fill at most eight waves, of three blocks a multiprocessor, or there is one for
// each.
int64_t selection(const LayerConfig& c) {
    const fasa_decode_params p = largest(c, c.max_batch_size, c.max_seq_len);
    int64_t bytes = int64_t(fasa_decode_workspace(&p)) - int64_t(fasa_dense_decode_workspace(&p));
    if (c.reduction != FASA_REDUCE_SUM && c.reduction != FASA_REDUCE_PER_HEAD) {
        const int64_t waves = 8 * 3 * kMostMultiprocessors / (has_label_head(c) ? 1 : c.num_kv_heads);
        bytes += std::max<int64_t>(c.max_batch_size, waves) * c.num_q_heads * 4 + 256;
    }
    return bytes;
}

// Prefill's workspace grows with tokens and with sequences, but batches of 128 tokens a sequence or more run
// on other kernels, which may need less.
int64_t prefill(const LayerConfig& c) {
    int64_t most = 0;
    for (int64_t seqs = 1; seqs <= std::min(c.max_batch_size, c.max_num_tokens); ++seqs) {
        for (const int64_t tokens :
             {int64_t(c.max_num_tokens), std::min<int64_t>(c.max_num_tokens, 128 * seqs - 1)}) {
            fasa_prefill_params p = {};
            p.num_seqs = static_cast<int32_t>(seqs);
            p.num_tokens = static_cast<int32_t>(tokens);
            p.q_token_stride = int64_t(c.num_q_heads) * c.head_dim;
            p.num_q_heads = c.num_q_heads;
            p.softcap = c.softcap;
            p.window = c.window;
            p.pool = largest(c, 1, 1).pool;
            most = std::max(most, int64_t(fasa_prefill_workspace(&p)));
        }
    }
    return most;
}

}  // namespace

size_t step_workspace(const LayerConfig& c) {
    const auto tokens = int64_t(c.max_num_tokens);
    const size_t scratch = round_up(tokens * c.num_q_heads * c.head_dim * 2) + 2 * round_up(tokens * 4);
    const int64_t decode = dense_decode(c) + (c.n_tip == 0 ? 0 : selection(c));
    return scratch + round_up(std::max(prefill(c), decode));
}

// FASA_HAS_64 and its like tell the sources which they are (see head_dims.cuh).
bool has_head_dim(int32_t head_dim) {
    return with_head_dim(head_dim, [](auto) { return FASA_OK; }) == FASA_OK;
}

}  // namespace fasa
