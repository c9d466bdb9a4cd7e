// Dense attention of one query token a sequence: FASA's own attention, over all tokens instead of the chosen.
// A sequence is cut into chunks, one block of threads each, whose results a second kernel merges. Bound by
// memory: keys and values are read once.
#pragma once

#include "attend.cuh"
#include "dense.cuh"
#include "launch.cuh"

namespace fasa {

constexpr int kMergeThreads = 256;
constexpr int kDenseWarps = 8;  // of a block of threads, of which a multiprocessor runs two
constexpr int kCrews = kSelectWarps / kDenseWarps;

// Four elements of a weighted sum, and the sum of the weights.
struct Weighted {
    float4 sum;
    float total;
};

// Row of a chunk's result for a query head, in `partials`.
__device__ inline int64_t partial_row(const fasa_decode_params& p, const Partials& partials, int seq,
                                      int chunk, int head) {
    return (static_cast<int64_t>(seq) * partials.chunks + chunk) * p.num_q_heads + head;
}

// Attends to `count` tokens of chunk `chunk`, for `group` query heads from `head` on. Where it is the only
// chunk, the result goes to the output.
template <typename T, int HEAD_DIM, int WARPS, typename TokenAt>
__device__ void attend_chunk(const fasa_decode_params& p, const Partials& partials, int seq, int kv_head,
                             int head, int group, int chunk, bool only, const TokenAt& token_at, int count,
                             const Crew<WARPS>& crew, AttendScratch<HEAD_DIM, WARPS>& scratch) {
    for (int end = head + group; head < end; head += kHeads) {  // larger groups come again for the others
        const int64_t row = static_cast<int64_t>(seq) * p.num_q_heads + head;
        const auto result_at = [&] {
            const int64_t at = partial_row(p, partials, seq, chunk, head);
            return Attended<T>{static_cast<T*>(p.out) + row * HEAD_DIM,
                               only ? nullptr : partials.out + at * HEAD_DIM, partials.lse + at};
        };
        attend<T, HEAD_DIM>(p, seq, kv_head, min(kHeads, end - head),
                            static_cast<const T*>(p.q) + row * HEAD_DIM, token_at, count, result_at, crew,
                            scratch);
        if (head + kHeads < end) {
            next_merge(crew, scratch);
        }
    }
}

// The sum of the chunks' results, weighted by their sums of exponentials. `kLanes` threads hold a row, four
// elements each, and the rows of chunks go round the groups of lanes. All threads of a block call it, which
// may be more than kMergeThreads. shared: [kMergeThreads].
template <typename T, int HEAD_DIM>
__device__ void merge_chunks(const fasa_decode_params& p, const Partials& partials, int seq, int head,
                             int chunks, Weighted* shared) {
    constexpr int kLanes = HEAD_DIM / 4, kGroups = kMergeThreads / kLanes, kAhead = 2;
    const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
    const auto row = [&](int chunk) { return partial_row(p, partials, seq, chunk, head); };
    float4 value[kAhead];
    float lse[kAhead], largest = -INFINITY;
    const auto load = [&](int chunk) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const bool there = group < kGroups && chunk + i * kGroups < chunks;
            const int64_t at = row(there ? chunk + i * kGroups : 0);
            value[i] = reinterpret_cast<const float4*>(partials.out + at * HEAD_DIM)[lane];
            lse[i] = there ? partials.lse[at] : -INFINITY;
        }
    };
    load(group);
    for (int chunk = threadIdx.x % kWarp; chunk < chunks; chunk += kWarp) {
        largest = fmaxf(largest, partials.lse[row(chunk)]);
    }
    for (int step = kWarp / 2; step; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, step));
    }
    Weighted mine = {{0.f, 0.f, 0.f, 0.f}, 0.f};
    for (int chunk = group;; load(chunk)) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (lse[i] != -INFINITY) {  // else no token of it counts, and the value is NaN
                const float weight = exp2f(lse[i] - largest);
                mine.sum.x += weight * value[i].x, mine.sum.y += weight * value[i].y;
                mine.sum.z += weight * value[i].z, mine.sum.w += weight * value[i].w;
                mine.total += weight;
            }
        }
        chunk += kAhead * kGroups;
        if (chunk >= chunks) {
            break;
        }
    }
    if (threadIdx.x < kMergeThreads) {
        shared[threadIdx.x] = mine;
    }
    __syncthreads();
    if (group == 0) {
#pragma unroll
        for (int i = 1; i < kGroups; ++i) {
            const Weighted other = shared[i * kLanes + lane];
            mine.sum.x += other.sum.x, mine.sum.y += other.sum.y;
            mine.sum.z += other.sum.z, mine.sum.w += other.sum.w;
            mine.total += other.total;
        }
        using T2 = typename Vec2<T>::type;
        T2* target = reinterpret_cast<T2*>(static_cast<T*>(p.out) +
                                           (static_cast<int64_t>(seq) * p.num_q_heads + head) * HEAD_DIM) +
                     2 * lane;
        const float scale = 1.f / mine.total;
        target[0] = {from_float<T>(mine.sum.x * scale), from_float<T>(mine.sum.y * scale)};
        target[1] = {from_float<T>(mine.sum.z * scale), from_float<T>(mine.sum.w * scale)};
    }
    __syncthreads();
}

// Attends to chunk `chunk` of a sequence, if it has so many.
template <typename T, int HEAD_DIM>
__device__ void attend_dense(const fasa_decode_params& p, const Partials& partials, int seq, int kv_head,
                             int length, int chunk, const Crew<kDenseWarps>& crew,
                             AttendScratch<HEAD_DIM, kDenseWarps>& scratch) {
    const int seen = seen_tokens(length, p.window), skipped = chunk * partials.chunk_tokens;
    if (skipped < seen) {
        const int group = p.num_q_heads / p.pool.num_kv_heads, start = length - seen + skipped;
        attend_chunk<T, HEAD_DIM>(
            p, partials, seq, kv_head, kv_head * group, group, chunk, seen <= partials.chunk_tokens,
            [&](int i) { return start + i; }, min(partials.chunk_tokens, seen - skipped), crew, scratch);
    }
}

// What attend_all needs: each crew has its own.
template <int HEAD_DIM>
using CrewsScratch = AttendScratch<HEAD_DIM, kDenseWarps>[kCrews];

// All chunks of a sequence, by crews in turn, with the bits of the kernels below. Rarely called: not inlined,
// for it would cost its caller registers.
template <typename T, int HEAD_DIM>
__device__ __noinline__ void attend_all(const fasa_decode_params& p, const Partials& partials, int seq,
                                        int kv_head, int length, CrewsScratch<HEAD_DIM>& scratch) {
    static_assert(sizeof(scratch) >= sizeof(Weighted) * kMergeThreads);
    const int chunks = chunks_of(length, p.window, partials.chunk_tokens);
    const int group = p.num_q_heads / p.pool.num_kv_heads;
    const int mine = threadIdx.x / Crew<kDenseWarps>::kThreads;
    const Crew<kDenseWarps> crew{1 + mine};
    for (int chunk = mine; chunk < chunks; chunk += kCrews) {
        attend_dense<T, HEAD_DIM>(p, partials, seq, kv_head, length, chunk, crew, scratch[mine]);
        next_merge(crew, scratch[mine]);
    }
    __syncthreads();
    for (int i = 0; chunks > 1 && i < group; ++i) {
        merge_chunks<T, HEAD_DIM>(p, partials, seq, kv_head * group + i, chunks,
                                  reinterpret_cast<Weighted*>(&scratch));
    }
}

// Grid: chunks, KV heads, sequences.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(Crew<kDenseWarps>::kThreads, 2)
    dense_chunks(const __grid_constant__ fasa_decode_params p, const __grid_constant__ Partials partials) {
    extern __shared__ __align__(16) char shared[];
    wait_and_allow_next();
    attend_dense<T, HEAD_DIM>(p, partials, blockIdx.z, blockIdx.y, p.lengths[blockIdx.z], blockIdx.x,
                              Crew<kDenseWarps>{0},
                              *reinterpret_cast<AttendScratch<HEAD_DIM, kDenseWarps>*>(shared));
}

// Grid: sequences, query heads.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kMergeThreads)
    dense_merge(const __grid_constant__ fasa_decode_params p, const __grid_constant__ Partials partials) {
    __shared__ Weighted shared[kMergeThreads];
    // Before the wait: see wait_and_allow_next().
    const int chunks = chunks_of(p.lengths[blockIdx.x], p.window, partials.chunk_tokens);
    wait_for_previous();
    if (chunks > 1) {
        merge_chunks<T, HEAD_DIM>(p, partials, blockIdx.x, blockIdx.y, chunks, shared);
    }
}

template <typename T, int HEAD_DIM>
fasa_status launch_dense_of(const fasa_decode_params& p, const Partials& partials, cudaStream_t stream) {
    const dim3 chunks(partials.chunks, p.pool.num_kv_heads, p.num_seqs), rows(p.num_seqs, p.num_q_heads);
    const fasa_status status =
        launch_overlapped(dense_chunks<T, HEAD_DIM>, chunks, Crew<kDenseWarps>::kThreads,
                          sizeof(AttendScratch<HEAD_DIM, kDenseWarps>), stream, p, partials);
    return status != FASA_OK || partials.chunks == 1
               ? status
               : launch_overlapped(dense_merge<T, HEAD_DIM>, rows, kMergeThreads, 0, stream, p, partials);
}

template <int HEAD_DIM>
fasa_status launch_dense(const fasa_decode_params& p, const Partials& partials, cudaStream_t stream) {
    return p.pool.dtype == FASA_FLOAT16 ? launch_dense_of<__half, HEAD_DIM>(p, partials, stream)
                                        : launch_dense_of<__nv_bfloat16, HEAD_DIM>(p, partials, stream);
}

}  // namespace fasa
