// Exact attention of one group's queries over some tokens, by a crew of warps.
//
// Idea: each warp takes 16 of the tokens at a time and keeps its own running softmax; with a budget of 256
// that is one tile a warp. Rows go straight from the pool into tensor-core fragments, 16 bytes a load, and
// none passes through shared memory: the order of dims inside a dot product is free, so a thread's 16
// contiguous bytes of a key serve two steps, and values become fragments by exchanging halves of two tokens'
// words. Logits are queries times keys, so that a query head's weights lie where the second product wants
// them: transposed values times weights. The warps' partial results are merged in a fixed order at the end
// (merge.cuh). Bytes: 4 * head_dim a token and KV head, read once for the whole group.
#pragma once

#include "merge.cuh"
#include "mma.cuh"

namespace fasa {

constexpr int kTile = 16;  // tokens a warp takes at a time

template <typename T>
__device__ inline uint32_t pack(float low, float high) {
    const typename Vec2<T>::type pair{from_float<T>(low), from_float<T>(high)};
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// q: [group, HEAD_DIM], for group <= kHeads query heads. `token_at` numbers `count` >= 1 tokens; `result_at`
// gives an Attended<T>, when it is time, for registers are short. Calls need next_merge() between them.
template <typename T, int HEAD_DIM, int WARPS, typename TokenAt, typename ResultAt>
__device__ void attend(const fasa_decode_params& p, int seq, int kv_head, int group, const T* q,
                       const TokenAt& token_at, int count, const ResultAt& result_at, const Crew<WARPS>& crew,
                       AttendScratch<HEAD_DIM, WARPS>& scratch) {
    constexpr int kChunks = HEAD_DIM / 32;         // of a key: 32 dims over four lanes
    constexpr int kHalves = (HEAD_DIM + 63) / 64;  // of a value: 64 dims over eight lanes
    constexpr bool kAllAtOnce = HEAD_DIM <= 128;   // registers hold a tile's keys and values
    const int lane = threadIdx.x % kWarp, warp = crew.number();
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
    for (int first = warp * kTile; crew.attends() && first < count; first += WARPS * kTile) {
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
                k[c][n] = __ldg(reinterpret_cast<const uint4*>(key + c * 32));
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
                              ? __ldg(reinterpret_cast<const uint4*>(value[x] + h * 64))
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
        if (first >= WARPS * kTile) {  // not the warp's first tile
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

    merge_warps<T>(crew, scratch, largest, sum_of_four(total), acc, group, result_at);
}

}  // namespace fasa
