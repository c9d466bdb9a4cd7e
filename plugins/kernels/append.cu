// fasa_append: rotates new queries and keys, writes keys and values into the pool, and labels into their
// cache.
//
// One warp takes one head of one token. Bytes are few (a row in, a row out); for prefill the rows of a token
// are contiguous, so loads and stores coalesce.
#include "common.cuh"

namespace fasa {
namespace {

constexpr int kAppendThreads = 256;

// Quantises the first 2 * n_tip of a rotated key row (shared memory) and writes codes and scale; one warp.
__device__ void write_label(const fasa_labels& labels, const fasa_pool& pool, int seq, int token, int kv_head,
                            const float* key) {
    const int lane = threadIdx.x % kWarp;
    const int dims = 2 * labels.n_tip;
    const int top = labels.kind == FASA_LABELS_INT4 ? 7 : 127;
    float largest = 0.f;
    for (int d = lane; d < dims; d += kWarp) {
        largest = fmaxf(largest, fabsf(key[d]));
    }
    for (int step = kWarp / 2; step; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, step));
    }
    // The scale is stored as float16, so the codes are made with the rounded one. It is never 0 nor infinite.
    const __half scale = __float2half_rn(fminf(fmaxf(largest / top, 6.2e-5f), 65504.f));
    const float step = __half2float(scale);
    const int shift = __ffs(pool.tokens_per_block) - 1;
    const int64_t block = (block_offset(pool, seq, 0, token >> shift) & 0x7fffffff) / labels.offset_divisor;
    const int slot = token & (pool.tokens_per_block - 1);
    char* codes = static_cast<char*>(labels.labels) + block * labels.label_block_stride +
                  slot * labels.label_token_stride + kv_head * labels.label_head_stride;
    const auto code = [&](int d) { return max(-top, min(top, __float2int_rn(key[d] / step))); };
    if (labels.kind == FASA_LABELS_INT4) {
        for (int b = lane; b < labels.n_tip; b += kWarp) {
            codes[b] = static_cast<char>((code(2 * b) + 8) | (code(2 * b + 1) + 8) << 4);
        }
    } else {
        for (int d = lane; d < dims; d += kWarp) {
            codes[d] = static_cast<char>(code(d));
        }
    }
    if (lane == 0) {
        *reinterpret_cast<__half*>(static_cast<char*>(labels.scales) + block * labels.scale_block_stride +
                                   slot * labels.scale_token_stride + kv_head * labels.scale_head_stride) =
            scale;
    }
}

template <typename T>
__global__ void __launch_bounds__(kAppendThreads) append(const __grid_constant__ fasa_append_params p) {
    __shared__ float rotated[kAppendThreads / kWarp][256];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int head_dim = p.pool.head_dim;
    const int heads = p.num_q_heads + 2 * p.pool.num_kv_heads;
    const int64_t item = static_cast<int64_t>(blockIdx.x) * (kAppendThreads / kWarp) + warp;
    if (item >= static_cast<int64_t>(p.num_tokens) * heads) {
        return;
    }
    const int token = static_cast<int>(item / heads), head = static_cast<int>(item % heads);
    const int seq = p.sequence[token], position = p.position[token];
    if (head >= p.num_q_heads + p.pool.num_kv_heads) {  // a value: copied as it is
        const int kv_head = head - p.num_q_heads - p.pool.num_kv_heads;
        const T* from =
            static_cast<const T*>(p.v) + token * p.v_token_stride + static_cast<int64_t>(kv_head) * head_dim;
        T* to = pool_row<T>(p.pool, seq, 1, position, kv_head);
        for (int d = lane; d < head_dim; d += kWarp) {
            to[d] = from[d];
        }
        return;
    }
    const bool is_query = head < p.num_q_heads;
    const int own = is_query ? head : head - p.num_q_heads;
    const int kv_head = is_query ? own / (p.num_q_heads / p.pool.num_kv_heads) : own;
    const T* from = is_query ? static_cast<const T*>(p.q) + token * p.q_token_stride
                             : static_cast<const T*>(p.k) + token * p.k_token_stride;
    from += static_cast<int64_t>(own) * head_dim;
    T* to = is_query
                ? static_cast<T*>(p.q_out) + (static_cast<int64_t>(token) * p.num_q_heads + own) * head_dim
                : pool_row<T>(p.pool, seq, 0, position, kv_head);
    for (int chunk = lane; chunk < head_dim / 2; chunk += kWarp) {
        const int at = kv_head * (head_dim / 2) + chunk;
        float sin, cos;
        sincosf(static_cast<float>(position) * p.inv_freq[at], &sin, &cos);
        const float x = to_float(from[2 * chunk]), y = to_float(from[2 * chunk + 1]);
        const T first = from_float<T>((x * cos - y * sin) * p.rope_scale[at]);
        const T second = from_float<T>((y * cos + x * sin) * p.rope_scale[at]);
        to[2 * chunk] = first, to[2 * chunk + 1] = second;
        rotated[warp][2 * chunk] = to_float(first), rotated[warp][2 * chunk + 1] = to_float(second);
    }
    __syncwarp();
    if (!is_query && p.labels.kind != FASA_LABELS_PREFIX) {
        write_label(p.labels, p.pool, seq, position, kv_head, rotated[warp]);
    }
}

}  // namespace
}  // namespace fasa

extern "C" fasa_status fasa_append(const fasa_append_params* params, void* stream) {
    using namespace fasa;
    if (params == nullptr || params->num_tokens < 0 || params->pool.head_dim > 256 ||
        params->pool.head_dim % 2 || params->pool.num_kv_heads < 1 ||
        params->num_q_heads % params->pool.num_kv_heads) {
        return FASA_BAD_ARGUMENT;
    }
    if (params->num_tokens == 0) {
        return FASA_OK;
    }
    const int64_t items =
        static_cast<int64_t>(params->num_tokens) * (params->num_q_heads + 2 * params->pool.num_kv_heads);
    constexpr int kPerBlock = kAppendThreads / kWarp;
    const auto blocks = static_cast<unsigned>((items + kPerBlock - 1) / kPerBlock);
    const auto on = static_cast<cudaStream_t>(stream);
    if (params->pool.dtype == FASA_FLOAT16) {
        append<__half><<<blocks, kAppendThreads, 0, on>>>(*params);
    } else {
        append<__nv_bfloat16><<<blocks, kAppendThreads, 0, on>>>(*params);
    }
    return cudaPeekAtLastError() == cudaSuccess ? FASA_OK : FASA_LAUNCH_FAILED;
}
