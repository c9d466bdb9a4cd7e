// The step: who is in the batch, where the layer's cache lies, and which kernels take which tokens.
#include "step.h"

#include <cuda_runtime_api.h>

namespace fasa {
namespace {

// The workspace, in order. Each part is a multiple of 256 bytes.
struct Workspace {
    char* base;
    size_t bytes = 0;

    void* take(size_t count) {
        char* part = base + bytes;
        bytes += (count + 255) / 256 * 256;
        return part;
    }
};

struct Scratch {
    void* q;  // rotated
    int32_t *sequence, *position;

    Scratch(const LayerConfig& c, Workspace& workspace) {
        const auto tokens = static_cast<size_t>(c.max_num_tokens);
        q = workspace.take(tokens * c.num_q_heads * c.head_dim * 2);
        sequence = static_cast<int32_t*>(workspace.take(tokens * sizeof(int32_t)));
        position = static_cast<int32_t*>(workspace.take(tokens * sizeof(int32_t)));
    }
};

struct Batch {
    int32_t contexts = 0;        // sequences
    int32_t context_tokens = 0;  // of them
};

const char* read_batch(const StepInputs& in, Batch& batch) {
    const int32_t* types = in.host_request_types;
    while (batch.contexts < in.num_seqs && types[batch.contexts] == 0) {
        batch.context_tokens += in.host_context_lengths[batch.contexts++];
    }
    for (int32_t i = batch.contexts; i < in.num_seqs; ++i) {
        if (types[i] != 1) {
            return "host_request_types must be 0 for context sequences, which come first, and 1 for the "
                   "others";
        }
    }
    return batch.context_tokens + in.num_seqs - batch.contexts == in.num_tokens
               ? nullptr
               : "host_context_lengths and one token for each generating sequence do not add up to the "
                 "tokens";
}

const char* find_pool(const LayerConfig& c, const StepInputs& in, fasa_pool& pool) {
    if (c.layer_index >= in.num_mapped_layers) {
        return "host_kv_cache_pool_mapping has no row for the layer";
    }
    const int32_t* mapped = in.host_pool_mapping + 2 * c.layer_index;
    if (mapped[0] < 0 || mapped[0] >= in.num_pools || mapped[1] < 0 || mapped[1] >= c.num_layers) {
        return "host_kv_cache_pool_mapping names a pool or a layer that is not there";
    }
    pool.heads_per_block = c.num_kv_heads + has_label_head(c);
    const int64_t block_bytes = int64_t(c.tokens_per_block) * pool.heads_per_block * c.head_dim * 2;
    const int64_t* bases = in.host_pool_pointers + 2 * mapped[0];
    const auto layer_of = [&](int64_t base) {
        return base == 0 ? nullptr : reinterpret_cast<void*>(base + 2 * block_bytes * mapped[1]);
    };
    pool.primary = layer_of(bases[0]);
    pool.secondary = layer_of(bases[1]);
    pool.offsets = in.block_offsets + int64_t(mapped[0]) * in.num_seqs * 2 * in.max_blocks;
    pool.max_blocks = in.max_blocks;
    pool.tokens_per_block = c.tokens_per_block;
    pool.num_kv_heads = c.num_kv_heads;
    pool.head_dim = c.head_dim;
    pool.dtype = in.dtype;
    return pool.primary == nullptr ? "host_kv_cache_pool_pointers has no pool on the GPU" : nullptr;
}

// The label head comes after the other heads of a block.
fasa_labels labels_of(const LayerConfig& c, const fasa_pool& pool) {
    fasa_labels labels = {};
    labels.kind = static_cast<fasa_label_kind>(c.label_kind);
    labels.n_tip = c.n_tip;
    if (!has_label_head(c)) {
        return labels;
    }
    const int64_t row = int64_t(c.head_dim) * 2, head = row * c.tokens_per_block;
    const int64_t block = head * pool.heads_per_block;
    char* first = static_cast<char*>(pool.primary) + head * c.num_kv_heads;
    labels.labels = first;
    labels.scales = first + block;  // values follow keys
    labels.offset_divisor = 1;
    if (pool.secondary != nullptr) {
        labels.secondary_distance =
            reinterpret_cast<intptr_t>(pool.secondary) - reinterpret_cast<intptr_t>(pool.primary);
    }
    labels.label_block_stride = labels.scale_block_stride = block;
    labels.label_token_stride = labels.scale_token_stride = row;
    labels.label_head_stride = label_bytes(c);
    labels.scale_head_stride = 2;
    return labels;
}

fasa_decode_params decode_params(const LayerConfig& c, const fasa_pool& pool, int32_t num_seqs) {
    fasa_decode_params p = {};
    p.num_seqs = num_seqs;
    p.num_q_heads = c.num_q_heads;
    p.max_length = c.max_seq_len;
    p.dense_below = c.dense_below;
    p.budget = c.budget;
    p.sink = c.sink;
    p.recent = c.recent;
    p.scale = c.scale;
    p.softcap = c.softcap;
    p.window = c.window;
    p.reduction = static_cast<fasa_reduction>(c.reduction);
    p.pool = pool;
    p.labels = labels_of(c, pool);
    return p;
}

const char* failure(fasa_status status) {
    if (status == FASA_LAUNCH_FAILED) {
        return cudaGetErrorString(cudaGetLastError());
    }
    return status == FASA_OK ? nullptr : fasa_status_text(status);
}

fasa_status append(const LayerConfig& c, const StepInputs& in, const Scratch& scratch, const fasa_pool& pool,
                   void* stream) {
    fasa_append_params p = {};
    p.q = in.q;
    p.k = in.k;
    p.v = in.v;
    p.q_token_stride = int64_t(c.num_q_heads) * c.head_dim;
    p.k_token_stride = p.v_token_stride = int64_t(c.num_kv_heads) * c.head_dim;
    p.q_out = scratch.q;
    p.sequence = scratch.sequence;
    p.position = scratch.position;
    p.inv_freq = in.inv_freq;
    p.rope_scale = in.rope_scale;
    p.q_norm = in.q_norm;
    p.k_norm = in.k_norm;
    p.norm_eps = c.norm_eps;
    p.num_tokens = in.num_tokens;
    p.num_q_heads = c.num_q_heads;
    p.pool = pool;
    p.labels = labels_of(c, pool);
    return fasa_append(&p, stream);
}

fasa_status prefill(const LayerConfig& c, const StepInputs& in, const Batch& batch, const Scratch& scratch,
                    const fasa_pool& pool, void* out, const Workspace& left, size_t bytes, void* stream) {
    fasa_prefill_params p = {};
    p.q = scratch.q;
    p.q_token_stride = int64_t(c.num_q_heads) * c.head_dim;
    p.out = out;
    p.query_lengths = in.context_lengths;
    p.lengths = in.sequence_length;
    p.num_seqs = batch.contexts;
    p.num_tokens = batch.context_tokens;
    p.num_q_heads = c.num_q_heads;
    p.scale = c.scale;
    p.softcap = c.softcap;
    p.window = c.window;
    p.pool = pool;
    p.workspace = left.base + left.bytes;
    p.workspace_bytes = bytes - left.bytes;
    return fasa_prefill(&p, stream);
}

fasa_status decode(const LayerConfig& c, const StepInputs& in, const Batch& batch, const Scratch& scratch,
                   const fasa_pool& pool, void* out, const Workspace& left, size_t bytes, void* stream) {
    const int64_t first = int64_t(batch.context_tokens) * c.num_q_heads * c.head_dim * 2;
    fasa_decode_params p = decode_params(c, pool, in.num_seqs - batch.contexts);
    p.q = static_cast<const char*>(scratch.q) + first;
    p.out = static_cast<char*>(out) + first;
    p.lengths = in.sequence_length + batch.contexts;
    p.pool.offsets += int64_t(batch.contexts) * 2 * in.max_blocks;
    p.workspace = left.base + left.bytes;
    p.workspace_bytes = bytes - left.bytes;
    return c.n_tip == 0 ? fasa_dense_decode(&p, stream) : fasa_decode(&p, stream);
}

}  // namespace

const char* run_step(const LayerConfig& c, const StepInputs& in, void* out, void* workspace, size_t bytes,
                     void* stream) {
    if (in.num_tokens > c.max_num_tokens || in.num_seqs > c.max_batch_size) {
        return "more tokens or sequences than the engine was built for";
    }
    if (in.num_tokens < 1) {
        return nullptr;
    }
    Batch batch;
    fasa_pool pool = {};
    if (const char* wrong = read_batch(in, batch)) {
        return wrong;
    }
    if (const char* wrong = find_pool(c, in, pool)) {
        return wrong;
    }
    Workspace left = {static_cast<char*>(workspace)};
    const Scratch scratch(c, left);
    if (workspace == nullptr || bytes < left.bytes) {
        return fasa_status_text(FASA_SMALL_WORKSPACE);
    }
    if (!list_tokens(in.sequence_length, in.context_lengths, batch.contexts, batch.context_tokens,
                     in.num_seqs, scratch.sequence, scratch.position, stream)) {
        return "CUDA refused a launch; was the library built for this GPU?";
    }
    fasa_status status = append(c, in, scratch, pool, stream);
    if (status == FASA_OK && batch.context_tokens > 0) {
        status = prefill(c, in, batch, scratch, pool, out, left, bytes, stream);
    }
    if (status == FASA_OK && batch.contexts < in.num_seqs) {
        status = decode(c, in, batch, scratch, pool, out, left, bytes, stream);
    }
    return failure(status);
}

}  // namespace fasa
