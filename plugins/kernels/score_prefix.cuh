// The score pass over the key rows' own prefix, where there is no label cache.
//
// Idea: a row's first 4 * n_tip bytes lie 2 * head_dim bytes from the next row's, so this pass is bound by
// how the memory likes such pieces: a warp reads eight consecutive rows with each instruction, many
// instructions ahead. The pieces are tensor-core fragments as they are (the order of dims inside a product is
// free: see attend.cuh), and the query heads of the group are the columns, so that any reduction costs one
// read. Limit: n_tip 16: 64 bytes a token and KV head read, 2.25 a token set written.
#pragma once

#include "mma.cuh"
#include "score_labels.cuh"

namespace fasa {

// Combines values [TILES][2] that four lanes hold parts of: afterwards the first of lane t % TILES is tile
// t's.
template <int TILES, typename Combine>
__device__ inline void gather(float (&value)[TILES][2], Combine combine) {
    const int within = threadIdx.x % 4;
#pragma unroll
    for (int step = 1, tiles = TILES; step < 4; step *= 2, tiles = max(tiles / 2, 1)) {
        const bool odd = within & step;
#pragma unroll
        for (int t = 0; t < max(tiles / 2, 1); ++t) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float keep =
                    tiles == 1 || !odd ? value[2 * t % tiles][half] : value[(2 * t + 1) % tiles][half];
                const float give =
                    tiles == 1 || odd ? value[2 * t % tiles][half] : value[(2 * t + 1) % tiles][half];
                value[t][half] = combine(keep, __shfl_xor_sync(0xffffffff, give, step));
            }
        }
    }
}

// CHUNKS: of 32 dims (16 frequency chunks) that cover the label; COLUMNS: of eight query heads.
template <typename T, int CHUNKS, int COLUMNS, Pass PASS>
__global__ void __launch_bounds__(kScoreThreads, 2)
    score_prefix(const __grid_constant__ fasa_decode_params p, const Scores scores) {
    constexpr int kWarps = kScoreThreads / kWarp;
    constexpr int kTiles = CHUNKS >= 4 ? 1 : 4 / CHUNKS;  // of 16 tokens, in flight together
    const int kv_head = blockIdx.y, seq = blockIdx.z;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int quad = lane / 4, within = lane % 4;
    const int group = p.num_q_heads / p.pool.num_kv_heads, dims = 2 * p.labels.n_tip;
    const bool per_head = p.reduction == FASA_REDUCE_PER_HEAD;
    __shared__ float raw[kLabelDims];
    __shared__ float normaliser[16];
    allow_next();
    wait_for_previous();
    const int length = p.lengths[seq];
    if (length <= p.budget) {
        return;
    }
    const float factor = logit_factor(p);
    const int first_head = kv_head * group;
    if constexpr (PASS == Pass::kSoftmax) {
        for (int h = warp; h < group; h += kWarps) {
            const float norm = whole_normaliser(scores, seq, gridDim.x, p.num_q_heads, first_head + h);
            if (lane == 0) {
                normaliser[h] = norm;
            }
        }
        __syncthreads();
    }
    if (PASS != Pass::kNormalise && blockIdx.x == 0 && warp == 0) {  // for whoever scores a token again
        const bool sum = p.reduction == FASA_REDUCE_SUM;
        for (int s = 0; s < (sum ? 1 : group); ++s) {
            const int64_t at = sum ? static_cast<int64_t>(seq) * p.pool.num_kv_heads + kv_head
                                   : static_cast<int64_t>(seq) * p.num_q_heads + first_head + s;
            reduce_query(raw, p, seq, first_head + s, sum ? group : 1);
            for (int d = lane; d < dims; d += kWarp) {
                scores.queries[at * kLabelDims + d] = raw[d];
            }
            if (lane == 0) {
                scores.factors[at] = factor;
                scores.normaliser[at] = PASS == Pass::kSoftmax ? normaliser[s] : 0.f;
            }
            __syncwarp();
        }
    }
    // The part of a row's chunk c that this lane reads, as keys and as queries; none beyond the label.
    const auto inside = [&](int c) { return c * 32 + within * 8 < dims; };
    uint4 query[COLUMNS][CHUNKS];
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const int head = n * 8 + quad;
            const T* q = static_cast<const T*>(p.q) +
                         (static_cast<int64_t>(seq) * p.num_q_heads + first_head + head) * p.pool.head_dim;
            query[n][c] = head < group && inside(c) ? *reinterpret_cast<const uint4*>(q + c * 32 + within * 8)
                                                    : uint4{0, 0, 0, 0};
        }
    }
    const int octets = (length + kOctet - 1) / kOctet;
    const int batches = (octets + 2 * kTiles - 1) / (2 * kTiles);
    const int begin = static_cast<int64_t>(batches) * blockIdx.x / gridDim.x;
    const int end = static_cast<int64_t>(batches) * (blockIdx.x + 1) / gridDim.x;
    uint4 part[2][kTiles][CHUNKS][2];
    // Lane i finds the rows of a batch's i-th octet, a batch before they are read. Octets beyond the end
    // repeat the last one.
    const auto look_up = [&](int batch) {
        const int octet = min(batch * 2 * kTiles + lane % (2 * kTiles), octets - 1);
        return reinterpret_cast<uint64_t>(pool_row<T>(p.pool, seq, 0, octet * kOctet, kv_head));
    };
    const int mine = quad * p.pool.head_dim + within * 8;  // elements of an octet's rows before this lane's
    const auto load = [&](int turn, uint64_t rows) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
            const T* k = reinterpret_cast<const T*>(__shfl_sync(0xffffffff, rows, i)) + mine;
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                part[turn][i / 2][c][i % 2] = inside(c) ? load_16(k + c * 32) : uint4{0, 0, 0, 0};
            }
        }
    };
    Normaliser seen[COLUMNS][2];
    // Tile t's rows quad (octet 2t of the batch) and quad + 8 under this lane's heads: their logits.
    const auto multiply = [&](int turn, int t, float (&logit)[COLUMNS][4]) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const uint4 a = part[turn][t][c][0], b = part[turn][t][c][1];
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) {
                mma_16x8x16<T>(logit[n], a.x, b.x, a.y, b.y, query[n][c].x, query[n][c].y);
                mma_16x8x16<T>(logit[n], a.z, b.z, a.w, b.w, query[n][c].z, query[n][c].w);
            }
        }
    };
    // Writes the keys of one tile, rows quad and quad + 8, and its two octets' maxima.
    const auto store = [&](int64_t row, int octet, float first, float second, bool mine) {
        const int token = octet * kOctet + quad;
        const uint32_t keys =
            token_key(p, token, length, first) | token_key(p, token + kOctet, length, second) << 16;
        uint32_t largest = keys;
#pragma unroll
        for (int step = 4; step < kWarp; step *= 2) {
            largest = larger_pair(largest, __shfl_xor_sync(0xffffffff, largest, step));
        }
        if (mine) {
            uint16_t* to = scores.keys + row * scores.octets * kOctet + token;
            to[0] = static_cast<uint16_t>(keys), to[kOctet] = static_cast<uint16_t>(keys >> 16);
            if (quad == 0) {
                *reinterpret_cast<uint32_t*>(scores.maxima + row * scores.octets + octet) = largest;
            }
        }
    };
    const auto score = [&](int turn, int batch) {
        const int first = batch * 2 * kTiles;  // octet
        float total[kTiles][2] = {}, peak[kTiles][2];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            float logit[COLUMNS][4] = {};
            multiply(turn, t, logit);
            const int token = (first + 2 * t) * kOctet + quad;
            SoftmaxScore soft[2];
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int head = n * 8 + within * 2 + j;
                    const float s0 = logit[n][j] * factor, s1 = logit[n][2 + j] * factor;
                    if constexpr (PASS == Pass::kNormalise) {
                        const float logits[2] = {token < length ? s0 : -INFINITY,
                                                 token + kOctet < length ? s1 : -INFINITY};
                        seen[n][j].add(logits);
                    } else if constexpr (PASS == Pass::kSoftmax) {
                        if (head < group) {
                            soft[0].add(s0, normaliser[head]), soft[1].add(s1, normaliser[head]);
                        }
                    } else if (per_head) {
                        const int64_t row = static_cast<int64_t>(seq) * p.num_q_heads + first_head + head;
                        store(row, first + 2 * t, s0, s1, head < group);
                    } else if (head < group) {  // a column of zeros would make NaN of infinite keys
                        total[t][0] += s0, total[t][1] += s1;
                    }
                }
            }
            if constexpr (PASS == Pass::kSoftmax) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    total[t][half] = soft[half].sum, peak[t][half] = soft[half].peak;
                }
            }
        }
        if (PASS == Pass::kNormalise || (PASS == Pass::kKeys && per_head)) {
            return;
        }
        // Four lanes hold parts of each tile's scores; lane t % 4 of them ends with the whole of tile t.
        gather<kTiles>(total, [](float a, float b) { return a + b; });
        if constexpr (PASS == Pass::kSoftmax) {
            gather<kTiles>(peak, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                total[0][half] = SoftmaxScore{total[0][half], peak[0][half]}.value(p.reduction);
            }
        }
        store(static_cast<int64_t>(seq) * p.pool.num_kv_heads + kv_head, first + 2 * (within % kTiles),
              total[0][0], total[0][1], within < kTiles);
    };
    if (begin + warp < end) {
        const auto rows_of = [&](int batch) { return look_up(min(batch, end - 1)); };
        int batch = begin + warp;
        uint64_t rows = rows_of(batch + kWarps);
        load(0, rows_of(batch));
        for (; batch < end; batch += 2 * kWarps) {
            load(1, rows);
            rows = rows_of(batch + 2 * kWarps);
            score(0, batch);
            load(0, rows);
            rows = rows_of(batch + 3 * kWarps);
            if (batch + kWarps < end) {
                score(1, batch + kWarps);
            }
        }
    }
    if constexpr (PASS == Pass::kNormalise) {
        __shared__ float2 parts[kWarps][COLUMNS * 8];
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                seen[n][j].merge_lanes(4, kWarp / 2);
                if (quad == 0) {
                    parts[warp][n * 8 + within * 2 + j] = {seen[n][j].peak, seen[n][j].sum};
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < group) {
            Normaliser all;
            for (int w = 0; w < kWarps; ++w) {
                all.merge(parts[w][threadIdx.x]);
            }
            scores.partials[(static_cast<int64_t>(seq) * gridDim.x + blockIdx.x) * p.num_q_heads +
                            first_head + threadIdx.x] = {all.peak, all.sum};
        }
    }
}

}  // namespace fasa
