// Exact attention of one group's queries over some tokens, by one block of threads.
//
// Idea: each warp takes 16 of the tokens at a time and keeps its own running softmax; with a budget of 256
// that is one tile a warp. Rows go straight from the pool into tensor-core fragments, 16 bytes a load, and
// none passes through shared memory: the order of dims inside a dot product is free, so a thread's 16
// contiguous bytes of a key serve two steps, and values become fragments by exchanging halves of two tokens'
// words. Logits are queries times keys, so that a query head's weights lie where the second product wants
// them: transposed values times weights. The warps' partial results are merged in a fixed order at the end.
// Bytes: 4 * head_dim a token and KV head, read once for the whole group.
#pragma once

#include "block.cuh"
#include "mma.cuh"

namespace fasa {

constexpr int kTile = 16;        // tokens a warp takes at a time
constexpr int kHeads = 8;        // query heads at most
constexpr int kMergedHeads = 4;  // query heads merged at a time, to bound shared memory

// What the warps of a block merge. `partial`: of two dims and two heads, as a lane holds them; padded so that
// neither lanes of a warp nor four warps meet in a bank.
template <int HEAD_DIM>
struct AttendScratch {
    static constexpr int kSlots = kWarp / 4 * (kMergedHeads / 2);     // lanes that have one of the heads
    static constexpr int kItems = (HEAD_DIM + 63) / 64 * 4 * kSlots;  // of each, 4 in 64 dims
    float largest[kSelectWarps][kHeads];
    float total[kSelectWarps][kHeads];
    float peak[kHeads];
    float4 partial[kSelectWarps][kItems + 2];
};

template <typename T>
__device__ inline uint32_t pack(float low, float high) {
    const typename Vec2<T>::type pair{from_float<T>(low), from_float<T>(high)};
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Where a block leaves its result for `group` query heads: in `out`, or, to be merged with others, in
// `partial`.
template <typename T>
struct Attended {
    T* out;          // [group, HEAD_DIM], where `partial` is NULL
    float* partial;  // the same in float32
    float* lse;      // [group] with `partial`: log2 of the sum of exponentials
};

// Two neighbouring elements of a result.
template <typename T>
__device__ inline void store_pair(const Attended<T>& result, int at, float x, float y) {
    if (result.partial != nullptr) {
        *reinterpret_cast<float2*>(result.partial + at) = {x, y};
    } else {
        *reinterpret_cast<typename Vec2<T>::type*>(result.out + at) = {from_float<T>(x), from_float<T>(y)};
    }
}

// q: [group, HEAD_DIM], for group <= kHeads query heads. `token_at` numbers `count` >= 1 tokens; `result_at`
// gives an Attended<T>, when it is time, for registers are short.
template <typename T, int HEAD_DIM, typename TokenAt, typename ResultAt>
__device__ void attend(const fasa_decode_params& p, int seq, int kv_head, int group, const T* q,
                       const TokenAt& token_at, int count, const ResultAt& result_at,
                       AttendScratch<HEAD_DIM>& scratch) {
    constexpr int kChunks = HEAD_DIM / 32;         // of a key: 32 dims over four lanes
    constexpr int kHalves = (HEAD_DIM + 63) / 64;  // of a value: 64 dims over eight lanes
    constexpr bool kAllAtOnce = HEAD_DIM <= 128;   // registers hold a tile's keys and values
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int quad = lane / 4, within = lane % 4;

    // Read for each tile again, from the first-level cache: registers are short.
    const auto query = [&](int c) {
        return quad < group ? __ldg(reinterpret_cast<const uint4*>(q + quad * HEAD_DIM + c * 32 + within * 8))
                            : uint4{0, 0, 0, 0};
    };
    // Running softmax of head `quad` (`total`: this lane's share). acc: a lane has dims h * 64 + quad * 8 + 2
    // m and the next, of heads 2 * within and the next.
    float largest = -INFINITY, total = 0.f, acc[kHalves][4][4] = {};
    // Lanes 0..15 find the key rows of a tile, the others its value rows. Of tokens that are not there, keys
    // repeat the last one, values are 0.
    const auto token_of = [&](int first) { return token_at(min(first + lane % kTile, count - 1)); };
    for (int first = warp * kTile; first < count; first += kSelectWarps * kTile) {
        const T* row = pool_row<T>(p.pool, seq, lane / kTile, token_of(first), kv_head);
        const auto row_of = [&](int kind, int token) {
            return reinterpret_cast<const T*>(
                __shfl_sync(0xffffffff, reinterpret_cast<uint64_t>(row), kind * kTile + token));
        };
        // All loads first: a tile costs one round trip to memory.
        uint4 k[kChunks][2], v[kHalves][4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const T* key = row_of(0, n * 8 + quad) + within * 8;
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                k[c][n] = *reinterpret_cast<const uint4*>(key + c * 32);
            }
        }
        const T* value[4];
        bool there[4];
#pragma unroll
        for (int x = 0; x < 4; ++x) {  // tokens 2 * within, the next, and 8 further
            const int token = 2 * within + x % 2 + x / 2 * 8;
            value[x] = row_of(1, token) + quad * 8;
            there[x] = first + token < count;
        }
        const auto load_values = [&](int h) {
#pragma unroll
            for (int x = 0; x < 4; ++x) {
                v[h][x] = there[x] && h * 64 + quad * 8 < HEAD_DIM
                              ? *reinterpret_cast<const uint4*>(value[x] + h * 64)
                              : uint4{0, 0, 0, 0};
            }
        };
        if constexpr (kAllAtOnce) {
#pragma unroll
            for (int h = 0; h < kHalves; ++h) {
                load_values(h);
            }
        }
        float logits[2][4] = {};  // of eight tokens: head quad, tokens 2 * within and the next
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const uint4 head = query(c);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                mma_16x8x16<T>(logits[n], head.x, 0, head.y, 0, k[c][n].x, k[c][n].y);
                mma_16x8x16<T>(logits[n], head.z, 0, head.w, 0, k[c][n].z, k[c][n].w);
            }
        }
        float s[2][2], peak = largest;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float x = logits[n][j] * p.scale;
                x = p.softcap > 0.f ? p.softcap * tanhf(x / p.softcap) : x;
                s[n][j] = first + n * 8 + 2 * within + j < count ? x * kLog2e : -INFINITY;
                peak = fmaxf(peak, s[n][j]);
            }
        }
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, 2));
        const float base = peak == -INFINITY ? 0.f : peak;
        const float decay = exp2f(largest - base);
        largest = peak;
        total *= decay;
        uint32_t weight[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float w0 = exp2f(s[n][0] - base), w1 = exp2f(s[n][1] - base);
            total += w0 + w1;
            weight[n] = pack<T>(w0, w1);
        }
        if (first >= kSelectWarps * kTile) {  // not the warp's first tile
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float factor = __shfl_sync(0xffffffff, decay, (2 * within + j) * 4);
#pragma unroll
                for (int h = 0; h < kHalves; ++h) {
#pragma unroll
                    for (int m = 0; m < 4; ++m) {
                        acc[h][m][j] *= factor, acc[h][m][2 + j] *= factor;
                    }
                }
            }
        }
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
            if constexpr (!kAllAtOnce) {
                load_values(h);
            }
            const auto word = [&](int x, int m) {  // dims 2 m and 2 m + 1 of this lane's eight
                return m == 0 ? v[h][x].x : m == 1 ? v[h][x].y : m == 2 ? v[h][x].z : v[h][x].w;
            };
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                mma_16x8x16<T>(acc[h][m], __byte_perm(word(0, m), word(1, m), 0x5410),
                               __byte_perm(word(0, m), word(1, m), 0x7632),
                               __byte_perm(word(2, m), word(3, m), 0x5410),
                               __byte_perm(word(2, m), word(3, m), 0x7632), weight[0], weight[1]);
            }
        }
    }

    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    if (within == 0) {
        scratch.largest[warp][quad] = largest;
        scratch.total[warp][quad] = total;
    }
    __syncthreads();
    // Of heads 2 * within and the next.
    const auto pair_of = [&](float (&of_heads)[kHeads]) -> float2& {
        return reinterpret_cast<float2*>(of_heads)[within];
    };
    float2 peak = {-INFINITY, -INFINITY};
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) {
        const float2 other = pair_of(scratch.largest[w]);
        peak = {fmaxf(peak.x, other.x), fmaxf(peak.y, other.y)};
    }
    // Where no logit is above minus infinity all weights are 0, or NaN.
    peak = {peak.x == -INFINITY ? 0.f : peak.x, peak.y == -INFINITY ? 0.f : peak.y};
    const float2 own = pair_of(scratch.largest[warp]);
    const float2 factor = {exp2f(own.x - peak.x), exp2f(own.y - peak.y)};
    if (quad == 0) {
        pair_of(scratch.peak) = peak;
        float2& sum = pair_of(scratch.total[warp]);
        sum = {sum.x * factor.x, sum.y * factor.y};
    }
    const Attended<T> result = result_at();
    constexpr int kSlots = AttendScratch<HEAD_DIM>::kSlots, kItems = AttendScratch<HEAD_DIM>::kItems;
    constexpr int kParts = 4;  // threads an item, each for a quarter of the warps
#pragma unroll
    for (int first = 0; first < kHeads; first += kMergedHeads) {
        if (first >= group) {
            break;
        }
        const int pair = within - first / 2;  // of the heads that are merged now
        if (pair >= 0 && pair < kMergedHeads / 2) {
#pragma unroll
            for (int i = 0; i < kItems / kSlots; ++i) {
                const auto& sum = acc[i / 4][i % 4];
                scratch.partial[warp][i * kSlots + quad * (kMergedHeads / 2) + pair] = {
                    sum[0] * factor.x, sum[1] * factor.y, sum[2] * factor.x, sum[3] * factor.y};
            }
        }
        __syncthreads();
        const int part = threadIdx.x % kParts;
        for (int item = threadIdx.x / kParts; item < kItems; item += kSelectThreads / kParts) {
            const int slot = item % kSlots, i = item / kSlots;
            const int dim = i / 4 * 64 + slot / (kMergedHeads / 2) * 8 + i % 4 * 2;
            const int pair_head = first + slot % (kMergedHeads / 2) * 2;
            float sums[6] = {};  // (head, dim), (next head, dim), the same for the next dim; weights
#pragma unroll
            for (int w = part; w < kSelectWarps; w += kParts) {
                const float4 other = scratch.partial[w][item];
                const float2 weights = reinterpret_cast<const float2&>(scratch.total[w][pair_head]);
                sums[0] += other.x, sums[1] += other.y, sums[2] += other.z, sums[3] += other.w;
                sums[4] += weights.x, sums[5] += weights.y;
            }
#pragma unroll
            for (float& sum : sums) {
                sum += __shfl_xor_sync(0xffffffff, sum, 1);
                sum += __shfl_xor_sync(0xffffffff, sum, 2);
            }
            const int head = pair_head + part;  // two of the threads store
            if (part < 2 && head < group && dim < HEAD_DIM) {
                const float norm = part == 0 ? sums[4] : sums[5], inverse = 1.f / norm;
                store_pair(result, head * HEAD_DIM + dim, (part == 0 ? sums[0] : sums[1]) * inverse,
                           (part == 0 ? sums[2] : sums[3]) * inverse);
                if (result.partial != nullptr && dim == 0) {
                    result.lse[head] = scratch.peak[head] + log2f(norm);
                }
            }
        }
        __syncthreads();
    }
}

}  // namespace fasa
