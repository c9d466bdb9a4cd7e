/* FASA decode kernels: the C interface. No TensorRT, no PyTorch; device pointers, plain structs and a stream.
 *
 * All functions launch on the given stream and return at once. They never allocate, never synchronise and
 * never read device memory on the host, so they can be captured into a CUDA graph; lengths and block offsets
 * may change between replays. Everything is deterministic for equal input.
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
    FASA_UNSUPPORTED = 2,     /* a combination that no kernel was compiled for */
    FASA_SMALL_WORKSPACE = 3, /* workspace_bytes is below fasa_decode_workspace() */
    FASA_LAUNCH_FAILED = 4    /* CUDA refused the launch; cudaGetLastError() of the calling thread says why */
} fasa_status;

typedef enum { FASA_FLOAT16 = 0, FASA_BFLOAT16 = 1 } fasa_dtype;

/* Where the label of a token, the dominant dims of its key, is read from.
 * PREFIX: the first 2 * n_tip elements of its key row. INT4: n_tip bytes, element 2j in the low nibble of
 * byte j, stored + 8, in -7..7. INT8: 2 * n_tip bytes, in -127..127. Both quantised symmetrically with one
 * scale a row. */
typedef enum { FASA_LABELS_PREFIX = 0, FASA_LABELS_INT4 = 1, FASA_LABELS_INT8 = 2 } fasa_label_kind;

/* How the query heads of a group share a token set. SUM: by the sum of their scores. PER_HEAD: not at all. */
typedef enum { FASA_REDUCE_SUM = 0, FASA_REDUCE_PER_HEAD = 1 } fasa_reduction;

/* One layer's view of a paged KV pool, laid out as TensorRT-LLM 1.2 does: a block holds
 * [num_kv_heads, tokens_per_block, head_dim] elements of keys or of values. */
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
    int32_t head_dim;         /* 64, 96, 128 or 256 */
    fasa_dtype dtype;         /* of keys, values, queries and output */
} fasa_pool;

/* A label cache. The label of a token lies in block (key offset / offset_divisor) of `labels`. */
typedef struct {
    fasa_label_kind kind;
    int32_t n_tip;          /* 8, 16, 24, 32, 48 or 64 frequency chunks; at most head_dim / 2 */
    void* labels;           /* device; unused for PREFIX, like everything below */
    void* scales;           /* device float16, one a token and KV head */
    int32_t offset_divisor; /* 2 * layers of the pool */
    int64_t label_block_stride, label_token_stride, label_head_stride; /* bytes; multiples of 8 */
    int64_t scale_block_stride, scale_token_stride, scale_head_stride; /* bytes; multiples of 2 */
} fasa_labels;

typedef struct {
    const void* q;          /* device [num_seqs, num_q_heads, head_dim], after RoPE */
    void* out;              /* device, the same shape */
    const int32_t* lengths; /* device int32 [num_seqs]: cached tokens, the current one included; at least 1 */
    int32_t num_seqs;       /* 1..65535 */
    int32_t num_q_heads;    /* 1..16 times num_kv_heads */
    int32_t max_length;     /* no sequence is longer, now or when a captured graph is replayed */
    int32_t budget;         /* tokens attended, 16..4096 */
    int32_t sink, recent;   /* first and last tokens that are always among them; recent >= 1 */
    float scale;            /* on the logits, usually 1 / sqrt(head_dim) */
    float softcap;          /* of the logits, 0 for none */
    fasa_reduction reduction;
    fasa_pool pool;
    fasa_labels labels;
    void* workspace; /* device, 256-byte aligned */
    size_t workspace_bytes;
} fasa_decode_params;

/* Bytes of workspace that fasa_decode needs; grows with max_length and num_seqs. 0 for invalid parameters. */
FASA_API size_t fasa_decode_workspace(const fasa_decode_params* params);

/* One decode step of one layer: scores every cached token with its label, chooses `budget` of them, attends
 * to those. Sequences within the budget are attended whole. `stream` is a cudaStream_t. */
FASA_API fasa_status fasa_decode(const fasa_decode_params* params, void* stream);

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
    int32_t num_tokens;
    int32_t num_q_heads;
    fasa_pool pool;
    fasa_labels labels; /* written with the keys unless PREFIX */
} fasa_append_params;

/* Rotates the queries and keys of new tokens, writes keys and values into the pool and labels into their
 * cache. */
FASA_API fasa_status fasa_append(const fasa_append_params* params, void* stream);

/* A sentence for a status; never NULL. */
FASA_API const char* fasa_status_text(fasa_status status);

#ifdef __cplusplus
}
#endif
#endif
