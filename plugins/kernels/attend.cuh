// Exact attention of one group's queries over a list of tokens, by one block of threads.
//
// Idea: each warp takes 16 listed tokens at a time and keeps its own running softmax. Key rows go straight
// from the pool into tensor-core fragments: the order of dims inside a dot product is free, so a thread's 16
// contiguous bytes serve two k-steps and no row passes through shared memory. Values are few per query head
// and go through plain FMAs, each lane owning the same dims of every row. The warps' partial results are
// merged in a fixed order at the end. Bytes: 2 * head_dim * 2 a token and KV head, read once for the whole
// group.
#pragma once

#include <type_traits>

#include "block.cuh"

namespace fasa {

constexpr int kTile = 16;        // tokens a warp takes at a time
constexpr int kMergedHeads = 4;  // query heads merged at a time, to bound shared memory

template <typename T>
__device__ inline void mma_16x8x16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                   uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

template <int GROUP>
struct AttendTile {
    float weight[kTile][GROUP];  // softmax numerators of the tile
    float decay[GROUP];          // factor on what the warp has accumulated so far
};

template <int HEAD_DIM, int GROUP>
struct AttendScratch {
    AttendTile<GROUP> tile[kSelectWarps];
    float largest[kSelectWarps][GROUP];
    float total[kSelectWarps][GROUP];
    float factor[kSelectWarps][GROUP];  // of a warp's sums, to bring them to the common maximum and normalise
    float partial[kSelectWarps][kMergedHeads][HEAD_DIM];
};

// HEAD_DIM elements of a row over the lanes of a warp: lane l owns [l * kOwned, (l + 1) * kOwned).
template <int HEAD_DIM>
constexpr int kOwned = HEAD_DIM == 64    ? 2
                       : HEAD_DIM == 256 ? 8
                                         : 4;  // 96: 24 lanes of 4

template <int OWNED>
using Raw = std::conditional_t<OWNED == 2, uint32_t, std::conditional_t<OWNED == 4, uint2, uint4>>;

template <typename T, int OWNED>
__device__ inline void convert(float (&to)[OWNED], const Raw<OWNED>& raw) {
    const auto* pair = reinterpret_cast<const typename Vec2<T>::type*>(&raw);
#pragma unroll
    for (int i = 0; i < OWNED / 2; ++i) {
        const float2 two = to_float2(pair[i]);
        to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
}

// q, out: the group's `group` <= GROUP query heads, HEAD_DIM elements each, contiguous. `count` >= 1 tokens
// are listed in `tokens` (shared memory), or are 0..count-1 where `tokens` is null.
template <typename T, int HEAD_DIM, int GROUP>
__device__ void attend(const fasa_decode_params& p, int seq, int kv_head, int group, const T* q, T* out,
                       const int* tokens, int count, AttendScratch<HEAD_DIM, GROUP>& scratch) {
    constexpr int kChunks = HEAD_DIM / 32;
    constexpr int kColumns = (GROUP + 7) / 8;  // groups of eight query heads, as the tensor core takes them
    constexpr int OWNED = kOwned<HEAD_DIM>;
    constexpr float kLog2e = 1.4426950408889634f;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int quad = lane / 4, within = lane % 4;
    const bool owns = lane * OWNED < HEAD_DIM;

    uint4 query[kColumns][kChunks];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const int head = n * 8 + quad;
            query[n][c] = head < group
                              ? *reinterpret_cast<const uint4*>(q + head * HEAD_DIM + c * 32 + within * 8)
                              : uint4{0, 0, 0, 0};
        }
    }
    // Running softmax. A lane knows the columns (query heads) n * 8 + within * 2 and the next; `acc` has all
    // heads.
    float largest[kColumns][2], total[kColumns][2], acc[GROUP][OWNED] = {};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
        largest[n][0] = largest[n][1] = -INFINITY;
        total[n][0] = total[n][1] = 0.f;
    }
    AttendTile<GROUP>& tile = scratch.tile[warp];
    for (int first = warp * kTile; first < count; first += kSelectWarps * kTile) {
        // Lanes 0..15 find the value rows, and every lane the two key rows of its fragment.
        const int listed = min(first + lane % kTile, count - 1);
        const T* v_row = pool_row<T>(p.pool, seq, 1, tokens ? tokens[listed] : listed, kv_head);
        const T* k_row[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = min(first + quad + 8 * half, count - 1);
            k_row[half] = pool_row<T>(p.pool, seq, 0, tokens ? tokens[at] : at, kv_head);
        }
        // All loads first: a tile costs one round trip to memory. Tokens that are not there repeat the last
        // one.
        uint4 k[kChunks][2];
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            k[c][0] = *reinterpret_cast<const uint4*>(k_row[0] + c * 32 + within * 8);
            k[c][1] = *reinterpret_cast<const uint4*>(k_row[1] + c * 32 + within * 8);
        }
        Raw<OWNED> v[kTile];
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
            const T* row =
                reinterpret_cast<const T*>(__shfl_sync(0xffffffff, reinterpret_cast<uint64_t>(v_row), t));
            v[t] = *reinterpret_cast<const Raw<OWNED>*>(row + (owns ? lane : 0) * OWNED);
        }
        float logits[kColumns][4] = {};
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const uint4 a = k[c][0], b = k[c][1];
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                mma_16x8x16<T>(logits[n], a.x, b.x, a.y, b.y, query[n][c].x, query[n][c].y);
                mma_16x8x16<T>(logits[n], a.z, b.z, a.w, b.w, query[n][c].z, query[n][c].w);
            }
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float s[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float x = logits[n][2 * half + j] * p.scale;
                    x = p.softcap > 0.f ? p.softcap * tanhf(x / p.softcap) : x;
                    s[half] = first + quad + 8 * half < count ? x * kLog2e : -INFINITY;
                }
                float peak = fmaxf(s[0], s[1]);
#pragma unroll
                for (int step = 4; step < kWarp; step *= 2) {
                    peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, step));
                }
                peak = fmaxf(peak, largest[n][j]);
                const float base = peak == -INFINITY ? 0.f : peak;
                const float w0 = exp2f(s[0] - base), w1 = exp2f(s[1] - base);
                const float decay = exp2f(largest[n][j] - base);
                float sum = w0 + w1;
#pragma unroll
                for (int step = 4; step < kWarp; step *= 2) {
                    sum += __shfl_xor_sync(0xffffffff, sum, step);
                }
                total[n][j] = total[n][j] * decay + sum;
                largest[n][j] = peak;
                const int head = n * 8 + within * 2 + j;
                if (head < GROUP) {
                    tile.weight[quad][head] = w0;
                    tile.weight[quad + 8][head] = w1;
                    if (quad == 0) {
                        tile.decay[head] = decay;
                    }
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (int h = 0; h < GROUP; ++h) {
            const float decay = tile.decay[h];
#pragma unroll
            for (int i = 0; i < OWNED; ++i) {
                acc[h][i] *= decay;
            }
        }
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
            float value[OWNED];
            convert<T, OWNED>(value, v[t]);
#pragma unroll
            for (int h = 0; h < GROUP; ++h) {
                const float weight = tile.weight[t][h];
#pragma unroll
                for (int i = 0; i < OWNED; ++i) {
                    acc[h][i] = fmaf(weight, value[i], acc[h][i]);
                }
            }
        }
        __syncwarp();
    }

#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int head = n * 8 + within * 2 + j;
            if (quad == 0 && head < GROUP) {
                scratch.largest[warp][head] = largest[n][j];
                scratch.total[warp][head] = total[n][j];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kSelectWarps * GROUP; i += kSelectThreads) {
        const int w = i / GROUP, h = i % GROUP;
        float peak = -INFINITY, norm = 0.f;
        for (int other = 0; other < kSelectWarps; ++other) {
            peak = fmaxf(peak, scratch.largest[other][h]);
        }
        for (int other = 0; other < kSelectWarps; ++other) {  // a warp without tokens has a total of 0
            norm += scratch.total[other][h] * exp2f(scratch.largest[other][h] - peak);
        }
        scratch.factor[w][h] = exp2f(scratch.largest[w][h] - peak) / norm;
    }
    __syncthreads();
#pragma unroll
    for (int first = 0; first < GROUP; first += kMergedHeads) {
        if (owns) {
#pragma unroll
            for (int h = first; h < min(first + kMergedHeads, GROUP); ++h) {
                const float factor = scratch.factor[warp][h];
#pragma unroll
                for (int i = 0; i < OWNED; ++i) {
                    scratch.partial[warp][h - first][lane * OWNED + i] = acc[h][i] * factor;
                }
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < min(kMergedHeads, group - first) * HEAD_DIM; i += kSelectThreads) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < kSelectWarps; ++w) {
                sum += scratch.partial[w][i / HEAD_DIM][i % HEAD_DIM];
            }
            out[first * HEAD_DIM + i] = from_float<T>(sum);
        }
        __syncthreads();
    }
}

}  // namespace fasa
