// One attention layer of one step of in-flight batching, without TensorRT: TensorRT-LLM 1.2's bindings in,
// calls of the kernels out. fasa_trt/core/contract.py tells what the bindings mean.
#pragma once

#include "../kernels/fasa.h"

namespace fasa {

// The attributes of a layer; ranges are in config.cpp.
struct LayerConfig {
    int32_t layer_index = 0;  // row of host_kv_cache_pool_mapping
    int32_t num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
    int32_t tokens_per_block = 0;
    int32_t num_layers = 0;                   // of the pool
    int32_t label_kind = FASA_LABELS_PREFIX;  // any other: the pool has a label head, see fasa.h
    int32_t n_tip = 0;                        // 0: a dense layer
    int32_t budget = 0, sink = 0, recent = 0, reduction = FASA_REDUCE_SUM;
    int32_t window = 0;  // 0: all tokens
    int32_t dense_below = FASA_DENSE_AUTO;
    int32_t has_qk_norm = 0;
    int32_t max_num_tokens = 0, max_batch_size = 0, max_seq_len = 0;
    float scale = 0.f, softcap = 0.f, norm_eps = 1e-6f;
};

// Whether blocks have one head more, for labels.
inline bool has_label_head(const LayerConfig& c) {
    return c.label_kind != FASA_LABELS_PREFIX;
}

// Of one label in the label head.
inline int32_t label_bytes(const LayerConfig& c) {
    return c.label_kind == FASA_LABELS_INT4 ? c.n_tip : 2 * c.n_tip;
}

// The tensors of a step. "host" ones are read while the step is launched, all others on the device.
struct StepInputs {
    fasa_dtype dtype;
    int32_t num_tokens, num_seqs;  // context sequences come first, then generating ones with a token each
    int32_t num_pools, num_mapped_layers, max_blocks;
    const void *q, *k, *v;  // [num_tokens, heads * head_dim]
    const float *inv_freq, *rope_scale;
    const int32_t *sequence_length, *context_lengths;
    const int32_t *host_context_lengths, *host_request_types;
    const int32_t* block_offsets;       // [num_pools, num_seqs, 2, max_blocks]
    const int64_t* host_pool_pointers;  // [num_pools, 2]
    const int32_t* host_pool_mapping;   // [num_mapped_layers, 2]
    const void *q_norm, *k_norm;        // or NULL
};

// Bytes of workspace for any step within the config's maxima, on any GPU that the kernels run on.
size_t step_workspace(const LayerConfig& config);

// Launches a step. Neither allocates nor synchronises; may be captured into a CUDA graph, whose replays
// follow sequence_length and block_offsets, while the number of sequences of each kind stays. Returns NULL,
// or a sentence that says what is wrong.
const char* run_step(const LayerConfig& config, const StepInputs& inputs, void* out, void* workspace,
                     size_t workspace_bytes, void* stream);

// Whether the library has kernels for a head_dim.
bool has_head_dim(int32_t head_dim);

// Writes for each token the row of the sequence it belongs to, and its position there. The first
// `context_tokens` tokens belong to the first `num_contexts` sequences. False if CUDA refused the launch.
bool list_tokens(const int32_t* sequence_length, const int32_t* context_lengths, int32_t num_contexts,
                 int32_t context_tokens, int32_t num_seqs, int32_t* sequence, int32_t* position,
                 void* stream);

}  // namespace fasa
