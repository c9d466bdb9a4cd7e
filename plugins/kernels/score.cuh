// The score pass: one 16-bit key for every cached token and token set.
//
// Idea: a decode step is bound by the bytes it reads, and this pass reads one short label of every token.
// Labels of all KV heads of a token lie side by side (token-major), so a block of threads lays its threads
// over (octet of tokens, token set) with the token set running fastest: a warp reads whole contiguous rows,
// each thread keeps its own quantised query in registers and has eight labels in flight. A label costs 4 *
// WORDS bytes and WORDS (INT8) or 2 * WORDS (INT4) dp4a instructions. Bytes a token and KV head: label + 2
// (scale) read, 2.25 a token set written. Limit: 128k tokens x batch 8, 8 KV heads, 4-bit n_tip 32: 285 MB +
// 19 MB, 70 us at 4.3 TB/s.
#pragma once

#include "labels.cuh"

namespace fasa {

constexpr int kScoreThreads = 256;
constexpr int kMaxSets = 128;  // token sets of a sequence that one block of threads can serve

// The key of one token of a row.
__device__ inline uint32_t token_key(const fasa_decode_params& p, int token, int length, float score) {
    if (token >= length) {
        return kHidden;
    }
    return is_forced(token, length, p.sink, p.recent) ? kForced : score_key(score);
}

__device__ inline uint32_t larger_key(uint32_t a, uint32_t b) {
    return __hgt(__ushort_as_half(a), __ushort_as_half(b)) ? a : b;
}

template <typename T, int WORDS, bool INT4>
__global__ void __launch_bounds__(kScoreThreads)
    score_labels(const __grid_constant__ fasa_decode_params p, const Scores scores, int sets) {
    constexpr int kDims = INT4 ? 8 * WORDS : 4 * WORDS;
    __shared__ float query[kScoreThreads / kWarp][kDims];
    __shared__ __align__(4) int8_t codes[kMaxSets][kDims];
    __shared__ float query_scales[kMaxSets];
    const int seq = blockIdx.y;
    allow_next();
    const int length = p.lengths[seq];
    if (length <= p.budget) {
        return;
    }
    const int warp = threadIdx.x / kWarp;
    for (int set = warp; set < sets; set += kScoreThreads / kWarp) {
        reduce_query<T>(query[warp], p, seq, set);
        const float scale = quantise_query(query[warp], codes[set], kDims);
        if (threadIdx.x % kWarp == 0) {
            query_scales[set] = scale * p.scale;
        }
    }
    __syncthreads();

    const int per_pass = kScoreThreads / sets;
    const int set = threadIdx.x % sets;
    if (threadIdx.x >= per_pass * sets) {
        return;
    }
    QuantisedQuery<WORDS, INT4> mine;
    pack_query(mine, codes[set]);
    const float query_scale = query_scales[set];
    const int kv_head = set / (sets / p.pool.num_kv_heads);
    const int64_t row = static_cast<int64_t>(seq) * sets + set;
    if (blockIdx.x == 0 && threadIdx.x < sets) {
        scores.factors[row] = query_scale;
        for (int d = 0; d < kDims; d += 4) {
            *reinterpret_cast<int*>(scores.codes + row * kCodes + d) =
                *reinterpret_cast<const int*>(codes[set] + d);
        }
    }
    const int octets = (length + kOctet - 1) / kOctet;
    const int begin = static_cast<int64_t>(octets) * blockIdx.x / gridDim.x;
    const int end = static_cast<int64_t>(octets) * (blockIdx.x + 1) / gridDim.x;
    // Half an octet is in flight while the other half is scored.
    constexpr int kHalf = kOctet / 2;
    uint32_t label[2][kHalf][WORDS];
    __half scale[2][kHalf];
    const auto load = [&](int half, const LabelAddress& at) {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            load_label(label[half][i], at.label + (half * kHalf + i) * p.labels.label_token_stride);
            const char* source = at.scale + (half * kHalf + i) * p.labels.scale_token_stride;
            scale[half][i] = __ldg(reinterpret_cast<const __half*>(source));
        }
    };
    int octet = begin + threadIdx.x / sets;
    if (octet >= end) {
        return;
    }
    LabelAddress at = label_address(p.pool, p.labels, seq, octet * kOctet, kv_head);
    load(0, at);
    for (; octet < end; octet += per_pass) {
        const int next = min(octet + per_pass, end - 1);
        const LabelAddress next_at = label_address(p.pool, p.labels, seq, next * kOctet, kv_head);
        uint32_t key[kOctet], largest = kHidden;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            load(1 - half, half == 0 ? at : next_at);
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
                const float dot = static_cast<float>(label_dot<WORDS, INT4>(label[half][i], mine));
                const int token = octet * kOctet + half * kHalf + i;
                key[half * kHalf + i] =
                    token_key(p, token, length, dot * __half2float(scale[half][i]) * query_scale);
                largest = larger_key(largest, key[half * kHalf + i]);
            }
        }
        reinterpret_cast<uint4*>(scores.keys)[row * scores.octets + octet] = {
            key[0] | key[1] << 16, key[2] | key[3] << 16, key[4] | key[5] << 16, key[6] | key[7] << 16};
        scores.maxima[row * scores.octets + octet] = static_cast<uint16_t>(largest);
        at = next_at;
    }
}

// Labels in the key rows' prefix, 16-bit. Rows of one KV head lie head_dim elements apart, so a row's 4 *
// n_tip bytes are read by n_tip / 4 threads of 16 bytes each: LANES of them a token (n_tip 16: 4), eight
// tokens in flight a thread.
template <typename T, int LANES>
__global__ void __launch_bounds__(kScoreThreads)
    score_prefix(const __grid_constant__ fasa_decode_params p, const Scores scores, int sets) {
    constexpr int kTeams = kScoreThreads / LANES;  // a team scores one octet at a time
    __shared__ float query[2 * 4 * LANES];
    const int seq = blockIdx.z;
    const int set = blockIdx.y;
    allow_next();
    const int length = p.lengths[seq];
    if (length <= p.budget) {
        return;
    }
    if (threadIdx.x < kWarp) {
        reduce_query<T>(query, p, seq, set);
    }
    __syncthreads();
    const int lane = threadIdx.x % LANES;
    const int used = p.labels.n_tip / 4;  // lanes with something to read
    float mine[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        mine[i] = lane < used ? query[lane * 8 + i] * p.scale : 0.f;
    }
    const int kv_head = set / (sets / p.pool.num_kv_heads);
    const int64_t row = static_cast<int64_t>(seq) * sets + set;
    const int octets = (length + kOctet - 1) / kOctet;
    const int begin = static_cast<int64_t>(octets) * blockIdx.x / gridDim.x;
    const int end = static_cast<int64_t>(octets) * (blockIdx.x + 1) / gridDim.x;
    // Half an octet is in flight while the other half is scored, as above. Teams beyond the end repeat the
    // last octet.
    constexpr int kHalf = kOctet / 2;
    uint4 part[2][kHalf];
    const auto row_of = [&](int octet) {
        return pool_row<T>(p.pool, seq, 0, min(octet, end - 1) * kOctet, kv_head) +
               (lane < used ? lane : 0) * 8;
    };
    const auto load = [&](int half, const T* k) {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            part[half][i] = load_16(k + static_cast<int64_t>(half * kHalf + i) * p.pool.head_dim);
        }
    };
    if (begin >= end) {
        return;
    }
    const T* at = row_of(begin + threadIdx.x / LANES);
    load(0, at);
    for (int first = begin; first < end; first += kTeams) {
        const int octet = first + threadIdx.x / LANES;
        const bool real = octet < end;
        const T* next_at = row_of(octet + kTeams);
        float score[kOctet] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            load(1 - half, half == 0 ? at : next_at);
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
                const auto* pair = reinterpret_cast<const typename Vec2<T>::type*>(&part[half][i]);
                float& sum = score[half * kHalf + i];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 value = to_float2(pair[j]);
                    sum = fmaf(value.x, mine[2 * j], fmaf(value.y, mine[2 * j + 1], sum));
                }
            }
        }
        at = next_at;
        if (lane >= used) {  // nothing of its own; what it read may be infinite
#pragma unroll
            for (int i = 0; i < kOctet; ++i) {
                score[i] = 0.f;
            }
        }
        // Every lane gets all sums; each then makes the keys of its share of the octet.
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
#pragma unroll
            for (int step = LANES / 2; step; step /= 2) {
                score[i] += __shfl_xor_sync(0xffffffff, score[i], step);
            }
        }
        constexpr int kShare = LANES < kOctet ? kOctet / LANES : 1;
        float own[kShare] = {};
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
            own[i % kShare] = i / kShare == lane ? score[i] : own[i % kShare];
        }
        uint32_t key[kShare], largest = kHidden;
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            key[i] = token_key(p, octet * kOctet + lane * kShare + i, length, own[i]);
            largest = lane * kShare < kOctet ? larger_key(largest, key[i]) : kHidden;
        }
#pragma unroll
        for (int step = LANES / 2; step; step /= 2) {
            largest = larger_key(largest, __shfl_xor_sync(0xffffffff, largest, step));
        }
        if (real && lane * kShare < kOctet) {
            uint16_t* to = scores.keys + (row * scores.octets + octet) * kOctet + lane * kShare;
            if constexpr (kShare == 1) {
                *to = static_cast<uint16_t>(key[0]);
            } else {
#pragma unroll
                for (int i = 0; i < kShare; i += 2) {
                    reinterpret_cast<uint32_t*>(to)[i / 2] = key[i] | key[i + 1] << 16;
                }
            }
            if (lane == 0) {
                scores.maxima[row * scores.octets + octet] = static_cast<uint16_t>(largest);
            }
        }
    }
}

}  // namespace fasa
