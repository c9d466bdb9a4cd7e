// The score pass over the key rows' own prefix, where there is no label cache.
//
// Idea: a row's first 4 * n_tip bytes lie 2 * head_dim bytes from the next row's, so this pass is bound by
// how the memory likes such pieces: a warp reads eight consecutive rows with each instruction, many
// instructions ahead. The pieces are tensor-core fragments as they are (the order of dims inside a product is
// free: see attend.cuh), and the query heads of the group are the columns, so that any reduction costs one
// read. Limit: n_tip 16: 64 bytes a token and KV head read, 2.25 a token set written.
#pragma once

#include "launch.cuh"
#include "score_tile.cuh"

namespace fasa {

// CHUNKS: of 32 dims (16 frequency chunks) that cover the label; COLUMNS: of eight query heads.
template <typename T, int CHUNKS, int COLUMNS, Pass PASS>
__global__ void __launch_bounds__(kScoreThreads, 2)
    score_prefix(const __grid_constant__ fasa_decode_params p, const Scores scores) {
    constexpr int kTiles = CHUNKS >= 4 ? 1 : 4 / CHUNKS;  // of 16 tokens, in flight together
    const int kv_head = blockIdx.y, seq = blockIdx.z;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int quad = lane / 4, within = lane % 4;
    const int group = p.num_q_heads / p.pool.num_kv_heads, dims = 2 * p.labels.n_tip;
    const bool per_head = p.reduction == FASA_REDUCE_PER_HEAD;
    __shared__ float raw[kLabelDims];
    __shared__ float normaliser[16];
    // Before the wait: what wait_and_allow_next() says is older than the last kernel.
    const int length = p.lengths[seq];
    const int octets = octets_of(length);
    const VisitedTiles visited(length,
                               PASS == Pass::kNormalise && p.reduction == FASA_REDUCE_SAMPLED_SOFTMAX);
    const int batches = (visited.turns + kTiles - 1) / kTiles;
    const int begin = static_cast<int64_t>(batches) * blockIdx.x / gridDim.x;
    const int end = static_cast<int64_t>(batches) * (blockIdx.x + 1) / gridDim.x;
    // Lane i finds the rows of a batch's i-th octet, a batch before they are read. Octets beyond the end
    // repeat the last one.
    const auto rows_of = [&](int batch) {
        const int tile = visited[min(batch, end - 1) * kTiles + lane % (2 * kTiles) / 2];
        const int octet = min(2 * tile + lane % 2, octets - 1);
        return reinterpret_cast<uint64_t>(pool_row<T>(p.pool, seq, 0, octet * kOctet, kv_head));
    };
    int batch = begin + warp;
    uint64_t first_rows = 0, rows = 0;
    if (batch < end) {
        first_rows = rows_of(batch);
        rows = rows_of(batch + kScoreWarps);
    }
    wait_and_allow_next();
    if (length <= p.budget) {
        return;
    }
    const float factor = logit_factor(p);
    const int first_head = kv_head * group;
    if constexpr (PASS == Pass::kSoftmax) {
        whole_normalisers(normaliser, p, scores, seq, tokens_seen(p, length), first_head, group);
    }
    // The part of a row's chunk c that this lane reads, as keys and as queries; none beyond the label.
    const auto inside = [&](int c) { return c * 32 + within * 8 < dims; };
    uint4 query[COLUMNS][CHUNKS];
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const int head = n * kTileColumns + quad;
            const T* q = static_cast<const T*>(p.q) +
                         (static_cast<int64_t>(seq) * p.num_q_heads + first_head + head) * p.pool.head_dim;
            query[n][c] = head < group && inside(c) ? *reinterpret_cast<const uint4*>(q + c * 32 + within * 8)
                                                    : uint4{0, 0, 0, 0};
        }
    }
    uint4 part[2][kTiles][CHUNKS][2];
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
    const auto score = [&](int turn, int batch) {
        const int first = batch * 2 * kTiles;  // octet
        float total[kTiles][2] = {}, peak[kTiles][2];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            float logit[COLUMNS][4] = {};
            multiply(turn, t, logit);
            const int token = visited[batch * kTiles + t] * kTileTokens + quad;
            SoftmaxScore soft[2];
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    logit[n][i] *= factor;
                }
                if (PASS == Pass::kKeys && per_head) {
                    const int head = n * kTileColumns + quad;
                    const int64_t row = static_cast<int64_t>(seq) * p.num_q_heads + first_head + head;
                    store_columns(p, scores, length, first + 2 * t, logit[n],
                                  row * scores.octets + first + 2 * t, head < group);
                    continue;
                }
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int head = n * kTileColumns + within * 2 + j;
                    const float s0 = logit[n][j], s1 = logit[n][2 + j];
                    if constexpr (PASS == Pass::kNormalise) {
                        seen[n][j].add(
                            {token < length ? s0 : -INFINITY, token + kOctet < length ? s1 : -INFINITY});
                    } else if (head < group) {  // a column of zeros would make NaN of infinite keys
                        if constexpr (PASS == Pass::kSoftmax) {
                            soft[0].add(s0, normaliser[head]), soft[1].add(s1, normaliser[head]);
                        } else {
                            total[t][0] += s0, total[t][1] += s1;
                        }
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
        const int64_t row = static_cast<int64_t>(seq) * p.pool.num_kv_heads + kv_head;
        store_tiles(p, scores, length, first + 2 * (within % kTiles), total[0],
                    row * scores.octets + first + quad, quad < 2 * kTiles);
    };
    if (batch < end) {
        load(0, first_rows);
    }
    // For whoever scores a token again. By the warp that has the least to do, while its loads are under way.
    if (PASS != Pass::kNormalise && blockIdx.x == 0 && warp == kScoreWarps - 1) {
        const bool sum = p.reduction == FASA_REDUCE_SUM;
        for (int s = 0; s < (sum ? 1 : group); ++s) {
            const int64_t at = sum ? static_cast<int64_t>(seq) * p.pool.num_kv_heads + kv_head
                                   : static_cast<int64_t>(seq) * p.num_q_heads + first_head + s;
            QueryShare(p, seq, first_head + s, sum ? group : 1).store(raw, p.labels.n_tip);
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
    for (; batch < end; batch += 2 * kScoreWarps) {
        load(1, rows);
        rows = rows_of(batch + 2 * kScoreWarps);
        score(0, batch);
        load(0, rows);
        rows = rows_of(batch + 3 * kScoreWarps);
        if (batch + kScoreWarps < end) {
            score(1, batch + kScoreWarps);
        }
    }
    if constexpr (PASS == Pass::kNormalise) {
        __shared__ float parts[kScoreWarps][COLUMNS * kTileColumns];
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                seen[n][j].merge_lanes(4, kWarp / 2);
                if (quad == 0) {
                    parts[warp][n * kTileColumns + within * 2 + j] = seen[n][j].log2_sum();
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < group) {
            Normaliser all;
            for (int w = 0; w < kScoreWarps; ++w) {
                all.add({parts[w][threadIdx.x]});
            }
            scores.partials[(static_cast<int64_t>(seq) * scores.parts + blockIdx.x) * p.num_q_heads +
                            first_head + threadIdx.x] = all.log2_sum();
        }
    }
}

}  // namespace fasa
