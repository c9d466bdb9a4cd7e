// fasa_append: rotates new queries and keys, writes keys and values into the pool, and labels into their
// cache.
//
// One warp takes one head of one token. Bytes are few (a row in, a row out); for prefill the rows of a token
// are contiguous, so loads and stores coalesce.
#include "head_dims.cuh"
#include "labels.cuh"
#include "launch.cuh"

namespace fasa {
namespace {

constexpr int kAppendThreads = 256;

// Writes the label of a rotated key row (shared memory) to its place; one warp. A lane takes the pairs of
// dims that it rotated, so it waits for no other.
__device__ void write_label(const fasa_labels& labels, const LabelAddress& at, const float* key) {
    constexpr int kPairs = kLabelDims / (2 * kWarp);
    const int lane = threadIdx.x % kWarp;
    float2 pair[kPairs];
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        const int chunk = i * kWarp + lane;
        pair[i] = chunk < labels.n_tip ? reinterpret_cast<const float2*>(key)[chunk] : float2{0.f, 0.f};
        largest = fmaxf(largest, fmaxf(fabsf(pair[i].x), fabsf(pair[i].y)));
    }
    const auto write = [&](auto of) {  // a lane's part of the label
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            if (i * kWarp + lane < labels.n_tip) {
                reinterpret_cast<decltype(of(pair[i]))*>(at.label)[i * kWarp + lane] = of(pair[i]);
            }
        }
    };
    if (labels.kind == FASA_LABELS_FP8) {
        return write([](const float2& x) { return __nv_cvt_float2_to_fp8x2(x, __NV_SATFINITE, __NV_E4M3); });
    }
    largest = largest_in_warp(largest);
    const int top = labels.kind == FASA_LABELS_INT4 ? 7 : 127;
    // The scale is stored as float16, so the codes are made with the rounded one. It is never 0 nor infinite.
    const __half scale = __float2half_rn(fminf(fmaxf(largest / top, 6.2e-5f), 65504.f));
    const float step = __half2float(scale);
    const auto code = [&](float x) { return max(-top, min(top, __float2int_rn(x / step))); };
    if (labels.kind == FASA_LABELS_INT4) {
        write([&](const float2& x) { return static_cast<uint8_t>((code(x.x) + 8) | (code(x.y) + 8) << 4); });
    } else {
        write([&](const float2& x) {
            return static_cast<uint16_t>((code(x.x) & 0xff) | (code(x.y) & 0xff) << 8);
        });
    }
    if (lane == 0) {
        *reinterpret_cast<__half*>(at.scale) = scale;
    }
}

template <typename T>
__global__ void __launch_bounds__(kAppendThreads) append(const __grid_constant__ fasa_append_params p) {
    // With much less shared memory a block, the driver would split multiprocessors' memory between it and the
    // first-level cache otherwise than for attention, and changing that costs a layer 1.6 us.
    __shared__ float rotated[kAppendThreads / kWarp][256];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int head_dim = p.pool.head_dim;
    const int heads = p.num_q_heads + 2 * p.pool.num_kv_heads;
    const int64_t item = static_cast<int64_t>(blockIdx.x) * (kAppendThreads / kWarp) + warp;
    if (item >= static_cast<int64_t>(p.num_tokens) * heads) {
        return;
    }
    const int token = static_cast<int>(item / heads), head = static_cast<int>(item % heads);
    wait_and_allow_next();
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
    const auto* norm = static_cast<const T*>(is_query ? p.q_norm : p.k_norm);
    float inverse = 1.f;  // of the row's root mean square
    if (norm != nullptr) {
        norm += static_cast<int64_t>(own) * head_dim;
        float squares = 0.f;
        for (int d = lane; d < head_dim; d += kWarp) {
            const float x = to_float(from[d]);
            squares = fmaf(x, x, squares);
        }
        for (int step = kWarp / 2; step; step /= 2) {
            squares += __shfl_xor_sync(0xffffffff, squares, step);
        }
        inverse = rsqrtf(squares / static_cast<float>(head_dim) + p.norm_eps);
    }
    // Transformers rounds after normalising and after the weight; so does this.
    const auto normed = [&](int d) {
        const float x = to_float(from[d]);
        return norm == nullptr
                   ? x
                   : to_float(from_float<T>(to_float(from_float<T>(x * inverse)) * to_float(norm[d])));
    };
    struct Chunk {
        float x, y, frequency, scale;
    };
    const auto load = [&](int chunk) {
        const int at = kv_head * (head_dim / 2) + chunk;
        return Chunk{normed(2 * chunk), normed(2 * chunk + 1), p.inv_freq[at], p.rope_scale[at]};
    };
    // A chunk is asked for before the sine of the one before: range reduction has branches, which loads
    // behind it would wait for.
    Chunk next{};
    if (lane < head_dim / 2) {
        next = load(lane);
    }
    const int32_t block = is_query ? 0 : key_offset(p.pool, seq, position);
    T* to = is_query
                ? static_cast<T*>(p.q_out) + (static_cast<int64_t>(token) * p.num_q_heads + own) * head_dim
                : pool_row_at<T>(p.pool, block, position, kv_head);
    const bool labelled = !is_query && p.labels.kind != FASA_LABELS_PREFIX;
    const LabelAddress label =
        labelled ? label_address_at(p.pool, p.labels, block, position, kv_head) : LabelAddress{};
#pragma unroll 1
    for (int chunk = lane; chunk < head_dim / 2; chunk += kWarp) {
        const Chunk now = next;
        if (chunk + kWarp < head_dim / 2) {
            next = load(chunk + kWarp);
        }
        float sin, cos;
        sincosf(static_cast<float>(position) * now.frequency, &sin, &cos);
        const T first = from_float<T>((now.x * cos - now.y * sin) * now.scale);
        const T second = from_float<T>((now.y * cos + now.x * sin) * now.scale);
        to[2 * chunk] = first, to[2 * chunk + 1] = second;
        rotated[warp][2 * chunk] = to_float(first), rotated[warp][2 * chunk + 1] = to_float(second);
    }
    if (labelled) {
        write_label(p.labels, label, rotated[warp]);
    }
}

bool valid(const fasa_append_params& p) {
    const fasa_pool& pool = p.pool;
    const bool labelled = p.labels.kind != FASA_LABELS_PREFIX;
    return pool_valid(pool) && p.num_tokens >= 0 && pool.head_dim >= 2 && pool.head_dim <= 256 &&
           pool.head_dim % 2 == 0 && p.num_q_heads >= 1 && p.num_q_heads % pool.num_kv_heads == 0 &&
           (!labelled || (p.labels.n_tip >= 1 && 2 * p.labels.n_tip <= pool.head_dim &&
                          2 * p.labels.n_tip <= kLabelDims && p.labels.offset_divisor >= 1));
}

}  // namespace
}  // namespace fasa

extern "C" fasa_status fasa_append(const fasa_append_params* params, void* stream) {
    using namespace fasa;
    if (params == nullptr || !valid(*params)) {
        return FASA_BAD_ARGUMENT;
    }
    if (params->num_tokens == 0) {
        return FASA_OK;
    }
    const fasa_append_params p = completed(*params);
    const int64_t items = static_cast<int64_t>(p.num_tokens) * (p.num_q_heads + 2 * p.pool.num_kv_heads);
    constexpr int kPerBlock = kAppendThreads / kWarp;
    const auto blocks = static_cast<unsigned>((items + kPerBlock - 1) / kPerBlock);
    const auto on = static_cast<cudaStream_t>(stream);
    if (p.pool.dtype == FASA_FLOAT16) {
        return launch_overlapped(append<__half>, blocks, kAppendThreads, 0, on, p);
    }
    return launch_overlapped(append<__nv_bfloat16>, blocks, kAppendThreads, 0, on, p);
}
