// fasa_dense_decode: checks its parameters, splits the sequences into chunks for FlashInfer's tiles and
// merges what those leave.
#include "dense.cuh"
#include "head_dims.cuh"
#include "launch.cuh"

namespace fasa {
namespace {

constexpr int kLeastChunk = 256, kMostChunk = 2048, kChunkStep = 128;
constexpr int kMergeThreads = 256;

bool valid(const fasa_decode_params& p) {
    return dense_valid(p) && p.max_length >= 1;
}

int chunk_tokens(const fasa_decode_params& p) {
    const int pieces = 2 * multiprocessors() / (p.num_seqs * p.pool.num_kv_heads);
    const int seen = seen_tokens(p.max_length, p.window);
    const int each = pieces > 1 ? (seen + pieces - 1) / pieces : seen;
    const int clamped = each < kLeastChunk ? kLeastChunk : each > kMostChunk ? kMostChunk : each;
    return (clamped + kChunkStep - 1) / kChunkStep * kChunkStep;
}

Partials partials_of(const fasa_decode_params& p, int longest, void* workspace) {
    Partials partials;
    partials.chunk_tokens = chunk_tokens(p);
    partials.chunks = (seen_tokens(longest, p.window) + partials.chunk_tokens - 1) / partials.chunk_tokens;
    partials.width = (p.pool.head_dim + 63) / 64 * 64;
    const size_t rows = static_cast<size_t>(p.num_seqs) * partials.chunks * p.num_q_heads;
    partials.out = static_cast<float*>(workspace);
    partials.lse = partials.out + rows * partials.width;
    return partials;
}

// Four elements of a weighted sum; weights are 2^(lse - maximum) and add up to `total`, 0 for an empty sum.
struct Merged {
    float4 sum;
    float maximum, total;
};

__device__ inline Merged merged(const Merged& a, const Merged& b) {
    if (a.total == 0.f) {
        return b;
    }
    const float maximum = fmaxf(a.maximum, b.maximum);
    const float x = exp2f(a.maximum - maximum), y = exp2f(b.maximum - maximum);
    return {{a.sum.x * x + b.sum.x * y, a.sum.y * x + b.sum.y * y, a.sum.z * x + b.sum.z * y,
             a.sum.w * x + b.sum.w * y},
            maximum,
            a.total * x + b.total * y};
}

// The sum of the chunks' results, weighted by their sums of exponentials. One block of threads for each
// (sequence, head): `lanes` threads hold a row, four elements each, and the rows of chunks go round the
// groups of lanes. A single chunk passes through unchanged.
template <typename T>
__global__ __launch_bounds__(kMergeThreads) void merge_chunks(const Partials partials, T* out,
                                                              const int32_t* lengths, int longest, int window,
                                                              int head_dim) {
    __shared__ Merged shared[kMergeThreads];
    wait_for_previous();
    const int seq = blockIdx.x, head = blockIdx.y, num_heads = gridDim.y, length = lengths[seq];
    if (length > longest || length < 1) {
        return;
    }
    const int lanes = head_dim / 4, groups = kMergeThreads / lanes;
    const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
    const int chunks = (seen_tokens(length, window) + partials.chunk_tokens - 1) / partials.chunk_tokens;
    const int64_t first = static_cast<int64_t>(seq) * partials.chunks * num_heads + head;
    Merged mine = {{0.f, 0.f, 0.f, 0.f}, 0.f, 0.f};
    for (int chunk = group; chunk < chunks && group < groups; chunk += groups) {
        const int64_t row = first + static_cast<int64_t>(chunk) * num_heads;
        const float4 value = reinterpret_cast<const float4*>(partials.out + row * partials.width)[lane];
        mine = merged(mine, {value, partials.lse[row], 1.f});
    }
    shared[threadIdx.x] = mine;
    __syncthreads();
    if (group != 0) {
        return;
    }
    for (int i = 1; i < groups && i < chunks; ++i) {
        mine = merged(mine, shared[i * lanes + lane]);
    }
    const float4 sum = mine.sum;
    const float total = mine.total;
    using T2 = typename Vec2<T>::type;
    T2* target =
        reinterpret_cast<T2*>(out + (static_cast<int64_t>(seq) * num_heads + head) * head_dim) + 2 * lane;
    target[0] = {from_float<T>(sum.x / total), from_float<T>(sum.y / total)};
    target[1] = {from_float<T>(sum.z / total), from_float<T>(sum.w / total)};
}

template <typename T>
fasa_status launch_merge(const fasa_decode_params& p, int longest, const Partials& partials,
                         cudaStream_t stream) {
    const dim3 grid(p.num_seqs, p.num_q_heads);
    return launch_overlapped(merge_chunks<T>, grid, kMergeThreads, 0, stream, partials,
                             static_cast<T*>(p.out), p.lengths, longest, p.window, p.pool.head_dim);
}

}  // namespace

size_t dense_workspace(const fasa_decode_params& p) {
    const Partials partials = partials_of(p, p.max_length, nullptr);
    const size_t rows = static_cast<size_t>(p.num_seqs) * partials.chunks * p.num_q_heads;
    return partials.chunks > 1 ? rows * (partials.width + 1) * sizeof(float) : 0;
}

fasa_status launch_dense_decode(const fasa_decode_params& p, int longest, void* workspace,
                                cudaStream_t stream) {
    const Partials partials = partials_of(p, longest < p.max_length ? longest : p.max_length, workspace);
    const fasa_status attended = with_head_dim(p.pool.head_dim, [&](auto head_dim) {
        return launch_dense_chunks<head_dim()>(p, longest, partials, stream);
    });
    if (attended != FASA_OK || partials.chunks == 1) {
        return attended;
    }
    return p.pool.dtype == FASA_FLOAT16 ? launch_merge<__half>(p, longest, partials, stream)
                                        : launch_merge<__nv_bfloat16>(p, longest, partials, stream);
}

}  // namespace fasa

extern "C" size_t fasa_dense_decode_workspace(const fasa_decode_params* params) {
    return params != nullptr && fasa::valid(*params) ? fasa::dense_workspace(*params) : 0;
}

extern "C" fasa_status fasa_dense_decode(const fasa_decode_params* params, void* stream) {
    using namespace fasa;
    if (params == nullptr || !valid(*params)) {
        return FASA_BAD_ARGUMENT;
    }
    const fasa_decode_params p = completed(*params);
    const size_t needed = dense_workspace(p);
    if (p.workspace_bytes < needed || (needed && p.workspace == nullptr)) {
        return FASA_SMALL_WORKSPACE;
    }
    return launch_dense_decode(p, p.max_length, p.workspace, static_cast<cudaStream_t>(stream));
}
