/* FASA decode kernels: the C interface. No TensorRT, no PyTorch; device pointers, plain structs and a stream.
 *
 * All functions launch on the given stream and return at once. They never allocate, never synchronise and
 * never read device memory on the host, so they can be captured into a CUDA graph; lengths and block offsets
 * may change between replays. Everything is deterministic for equal input.
 *
 * On compute capability 9.0 and newer kernels start while the one before them still runs (programmatic stream
 * serialization) and read lengths and block offsets at once: whatever writes those must not let the next
 * kernel start before it is done (cudaTriggerProgrammaticLaunchCompletion).
 */
#ifndef FASA_H
#define FASA_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define FASA_API __declspec(dllexport)
#else
#define FASA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    FASA_OK = 0,
    FASA_BAD_ARGUMENT = 1,    /* a field is out of the range that its comment states */
    FASA_UNSUPPORTED = 2,     /* a head_dim that the library was not built for, or another missing kernel */
    FASA_SMALL_WORKSPACE = 3, /* workspace_bytes is below fasa_decode_workspace() */
    FASA_LAUNCH_FAILED = 4    /* CUDA refused the launch; cudaGetLastError() of the calling thread says why */
} fasa_status;

typedef enum { FASA_FLOAT16 = 0, FASA_BFLOAT16 = 1 } fasa_dtype;

/* Where the label of a token, the dominant dims of its key, is read from.
 * PREFIX: the first 2 * n_tip elements of its key row. INT4: n_tip bytes, element 2j in the low nibble of
 * byte j, stored + 8, in -7..7. INT8: 2 * n_tip bytes, in -127..127. Both quantised symmetrically with one
 * scale a row. FP8: 2 * n_tip bytes of e4m3, no scale. */
typedef enum {
    FASA_LABELS_PREFIX = 0,
    FASA_LABELS_INT4 = 1,
    FASA_LABELS_INT8 = 2,
    FASA_LABELS_FP8 = 3
} fasa_label_kind;

/* How the query heads of a group share a token set. SUM: by the sum of their scores. PER_HEAD: not at all.
 * MEAN_SOFTMAX, MAX_SOFTMAX: by the mean or maximum of their softmaxed scores; one more pass over the labels
 * finds each head's normaliser. SAMPLED_SOFTMAX: by the mean, with normalisers estimated from every 32nd run
 * of 16 tokens and the last two, so that the other pass is short. */
typedef enum {
    FASA_REDUCE_SUM = 0,
    FASA_REDUCE_PER_HEAD = 1,
    FASA_REDUCE_MEAN_SOFTMAX = 2,
    FASA_REDUCE_MAX_SOFTMAX = 3,
    FASA_REDUCE_SAMPLED_SOFTMAX = 4
} fasa_reduction;

/* One layer's view of a paged KV pool, laid out as TensorRT-LLM 1.2 does: a block holds
 * [heads_per_block, tokens_per_block, head_dim] elements of keys or of values. Heads past num_kv_heads are
 * neither read nor written, but for labels that point there (see fasa_labels). */
typedef struct {
    void* primary; /* base of the layer in the GPU pool */
    void*
        secondary; /* base of the layer in the host pool, reached where bit 31 of an offset is set; or NULL */
    const int32_t*
        offsets; /* device int32 [num_seqs, 2, max_blocks]: for keys (0) and values (1), the block number
                    in units of a block's bytes; entries past a sequence's last block are not read */
    int32_t max_blocks;       /* columns of offsets */
    int32_t tokens_per_block; /* power of two, 8..128 */
    int32_t num_kv_heads;     /* 1..32 */
    int32_t heads_per_block;  /* at least num_kv_heads; 0 for num_kv_heads; a block below 2^31 bytes */
    int32_t head_dim;         /* 64, 96, 128 or 256 */
    fasa_dtype dtype;         /* of keys, values, queries and output */
} fasa_pool;

/* A label cache. The label of a token lies in block (key offset / offset_divisor) of `labels`. It is one of
 *   an array beside the pool: offset_divisor is 2 * layers of the pool, secondary_distance 0;
 *   a label head, one head more in each block (heads_per_block = num_kv_heads + 1). A token's row of it holds
 *   the labels of all KV heads in the block of keys, and their scales in the block of values, which follows:
 *   `labels` and `scales` are the label heads of offset 0 and of offset 1, offset_divisor is 1, block strides
 *   are a block's bytes, token strides a row's, and secondary_distance is secondary - primary.
 * Either way the first n tokens of a block can be copied alone. */
typedef struct {
    fasa_label_kind kind;
    int32_t n_tip;              /* 8, 16, 24, 32, 48 or 64 frequency chunks; at most head_dim / 2 */
    void* labels;               /* device; unused for PREFIX, like everything below */
    void* scales;               /* device float16, one a token and KV head; unused for FP8 */
    int32_t offset_divisor;     /* at least 1 */
    int64_t secondary_distance; /* bytes from here to labels and scales of keys in the secondary pool */
    int64_t label_block_stride, label_token_stride, label_head_stride; /* bytes; multiples of 16, like the
                               address of `labels` and secondary_distance; of 8 where a label's bytes are
                               not a multiple of 16 */
    int64_t scale_block_stride, scale_token_stride, scale_head_stride; /* bytes; multiples of 2 */
} fasa_labels;

/* Sets aside up to 3/8 of the current device's L2 cache, once for each device and process, for the scores
 * that a step leaves between its kernels: as far as they find room (2.25 bytes a token and token set),
 * writing them costs no memory traffic. Raises cudaLimitPersistingL2CacheSize, never lowers it. Results do
 * not depend on it. FASA_UNSUPPORTED where the device has no such limit or does not let it be set (MIG, MPS).
 * Not while a graph is captured. */
FASA_API fasa_status fasa_reserve_l2(void);

typedef struct {
    const void* q;          /* device [num_seqs, num_q_heads, head_dim], after RoPE; 16-byte aligned, like out
                               and the pool */
    void* out;              /* device, the same shape */
    const int32_t* lengths; /* device int32 [num_seqs]: cached tokens, the current one included; at least 1 */
    int32_t num_seqs;       /* 1..65535 */
    int32_t num_q_heads;    /* 1..16 times num_kv_heads, at most 128 */
    int32_t max_length;     /* no sequence is longer, now or when a captured graph is replayed */
    int32_t dense_below;  /* if max_length is no larger, all sequences are attended whole; 0 takes the budget,
                             FASA_DENSE_AUTO the length at which sparse attention starts to be faster */
    int32_t budget;       /* tokens attended, 16..4096 */
    int32_t sink, recent; /* first and last tokens that are always among them; recent >= 1 */
    float scale;          /* on the logits, usually 1 / sqrt(head_dim) */
    float softcap;        /* of the logits, 0 for none */
    int32_t window;       /* tokens that a query sees, itself included; 0 for all, as fasa_decode needs */
    fasa_reduction reduction;
    fasa_pool pool;
    fasa_labels labels;
    void* workspace; /* device, 256-byte aligned */
    size_t workspace_bytes;
} fasa_decode_params;

#define FASA_DENSE_AUTO (-1)

/* Bytes of workspace that fasa_decode needs; grows with max_length and num_seqs. 0 for invalid parameters. */
FASA_API size_t fasa_decode_workspace(const fasa_decode_params* params);

/* One decode step of one layer: scores every cached token with its label, chooses `budget` of them, attends
 * to those. Sequences within the budget are attended whole, with the bits of fasa_dense_decode. The rule:
 *   max_length <= max(budget, dense_below): fasa_dense_decode for all;
 *   otherwise: sparse attention for the sequences above the budget, the same launches attend the others
 *   whole; each by its length on the device.
 * `stream` is a cudaStream_t. */
FASA_API fasa_status fasa_decode(const fasa_decode_params* params, void* stream);

/* The length that FASA_DENSE_AUTO stands for; 0 for invalid parameters. */
FASA_API int32_t fasa_dense_below(const fasa_decode_params* params);

typedef struct {
    const void*
        q; /* device, before RoPE; element (token, head) at q + token * q_token_stride + head * head_dim */
    const void* k; /* likewise, num_kv_heads heads */
    const void* v;
    int64_t q_token_stride, k_token_stride, v_token_stride; /* elements */
    void* q_out; /* device [num_tokens, num_q_heads, head_dim], after RoPE */
    const int32_t*
        sequence; /* device int32 [num_tokens]: the row of pool.offsets that each token belongs to */
    const int32_t* position; /* device int32 [num_tokens]: its position, also its slot in the sequence */
    const float* inv_freq;   /* device float32 [num_kv_heads, head_dim / 2], radians per position in baked
                                order: the two dims of chunk i are 2i and 2i + 1 */
    const float* rope_scale; /* device float32, the same shape: factor on cos and sin */
    const void* q_norm; /* device [num_q_heads, head_dim] of the pool's dtype: weights of an RMS norm over
                           each head of q before RoPE; or NULL for none */
    const void* k_norm; /* likewise [num_kv_heads, head_dim], for k */
    float norm_eps;
    int32_t num_tokens;
    int32_t num_q_heads;
    fasa_pool pool;
    fasa_labels labels; /* written with the keys unless PREFIX */
} fasa_append_params;

/* Rotates the queries and keys of new tokens, writes keys and values into the pool and labels into their
 * cache. */
FASA_API fasa_status fasa_append(const fasa_append_params* params, void* stream);

/* ---- Dense attention ----------------------------------------------------------------------------------
 * Over the same pool; q, out and the pool are 16-byte aligned. */

/* Bytes of workspace that fasa_dense_decode needs, on the current device. 0 for invalid parameters. */
FASA_API size_t fasa_dense_decode_workspace(const fasa_decode_params* params);

/* One decode step of one layer that attends every cached token, or the last `window`; budget, sink, recent,
 * dense_below, reduction and labels are not looked at. A sequence is split into chunks, whose results are
 * merged in float32, of
 *   seen / max(1, 2 * multiprocessors / (num_seqs * num_kv_heads))
 * tokens, 4096 at most and rounded up to a multiple of 128, where seen = max_length, or the window if that is
 * shorter; two chunks are not made of fewer than 1536 tokens. Equal chunks give equal bits, whatever the
 * other sequences are. */
FASA_API fasa_status fasa_dense_decode(const fasa_decode_params* params, void* stream);

/* Prefill of one layer: query i of a sequence is its token `length - query_length + i`, and sees the tokens
 * up to itself, or the last `window` of those. Keys and values, those of the queries included, are already in
 * the pool (fasa_append). With a past (chunked prefill, reused blocks) or without. On compute capability 9.0,
 * batches of 128 query tokens a sequence or more, on average, run on kernels of their own, unless there is a
 * window or a softcap or head_dim is 96. The kernels are FlashInfer's: all blocks of the attended sequences
 * must lie in the primary pool (the TensorRT-LLM runtime brings blocks there before it uses them), and the
 * value block of a token follows its key block, for only the key offsets are read. */
typedef struct {
    const void* q;          /* device, after RoPE, the sequences one after another; element (token, head) at
                               q + token * q_token_stride + head * head_dim */
    int64_t q_token_stride; /* elements, a multiple of 8; times num_tokens below 2^32 */
    void* out;              /* device [num_tokens, num_q_heads, head_dim], below 2^32 elements */
    const int32_t* query_lengths; /* device int32 [num_seqs]: tokens of each sequence in q, 0 for none */
    const int32_t* lengths;       /* device int32 [num_seqs]: cached tokens, those in q included */
    int32_t num_seqs;             /* 1..65535 */
    int32_t num_tokens;           /* the sum of query_lengths is no larger, now or in a replay */
    int32_t num_q_heads;          /* 1..16 times num_kv_heads */
    float scale;                  /* as in fasa_decode_params, like softcap and window */
    float softcap;
    int32_t window;
    fasa_pool pool;
    void* workspace; /* device, 256-byte aligned */
    size_t workspace_bytes;
} fasa_prefill_params;

/* Bytes of workspace that fasa_prefill needs. 0 for invalid parameters. */
FASA_API size_t fasa_prefill_workspace(const fasa_prefill_params* params);

FASA_API fasa_status fasa_prefill(const fasa_prefill_params* params, void* stream);

/* ------------------------------------------------------------------------------------------------------- */

/* A sentence for a status; never NULL. */
FASA_API const char* fasa_status_text(fasa_status status);

#ifdef __cplusplus
}
#endif
#endif
