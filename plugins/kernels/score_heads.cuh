// The score pass over a label cache where each query head counts by itself: PER_HEAD, and both passes of the
// softmax reductions.
//
// Idea: a label read once meets all query heads of its group as the columns of a tensor-core product
// (label_tile.cuh), so that the pass stays near the memory's speed whatever the group. A warp takes tiles of
// 16 tokens of a few neighbouring KV heads, always the same heads, from a ring of asynchronous copies of its
// own (tile_ring.cuh); the warps beside it take the other heads of those tokens. Bytes a token and KV head
// and pass: label + 2 (scale) read, 2.25 a token set written by the last one. Limit: 32k tokens x batch 8, 8
// KV heads, 4-bit n_tip 32: 71 MB a pass, 17 us at 4.3 TB/s; PER_HEAD with 32 query heads writes 19 MB more.
//
// The softmax reductions need each head's normaliser before the first key: a first pass finds it, a second
// reads the labels again. Keeping the first pass's logits instead would move as many bytes (4 a token and
// query head written and read, against 34 read again) and round them.
#pragma once

#include "head_queries.cuh"
#include "launch.cuh"
#include "tile_ring.cuh"

namespace fasa {

// KV heads are cut into `parts`, a power of two, of at most TileRing::kHeads; kScoreWarps parts a block.
template <class Tile, int COLUMNS>
size_t score_heads_shared(int kv_heads) {
    constexpr int kHeads = TileRing<Tile>::kHeads;
    const int most = kv_heads < kScoreWarps * kHeads ? kv_heads : kScoreWarps * kHeads;
    // A part of fewer heads computes as if it had all; nothing comes of the others.
    return kScoreWarps * TileRing<Tile>::kSize + HeadQueries<Tile, COLUMNS>::bytes(most + kHeads - 1);
}

// PAIRS: two KV heads share a tile of products; for groups of at most four.
template <class Tile, int COLUMNS, Pass PASS, bool PAIRS>
__global__ void __launch_bounds__(kScoreThreads, head_blocks(COLUMNS* kTileColumns))
    score_heads(const __grid_constant__ fasa_decode_params p, const Scores scores, int parts) {
    using Ring = TileRing<Tile>;
    using Queries = HeadQueries<Tile, COLUMNS>;
    constexpr int kHeads = Ring::kHeads;
    using Cut = Slices<kHeads, PAIRS>;
    constexpr int kSlices = Cut::kCount;
    extern __shared__ __align__(16) char shared[];
    const int seq = blockIdx.y, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int quad = lane / 4, within = lane % 4;
    wait_and_allow_next();
    const int length = p.lengths[seq];
    if (length <= p.budget) {
        return;
    }
    const int kv_heads = p.pool.num_kv_heads, group = p.num_q_heads / kv_heads;
    const int parts_here = min(parts, kScoreWarps), teams = kScoreWarps / parts_here,
              team = warp / parts_here;
    const auto first_of = [&](int part) { return kv_heads * part / parts; };
    const int part = blockIdx.z * parts_here + warp % parts_here;
    const int first_head = first_of(part), heads = first_of(part + 1) - first_head;
    const int block_first = first_of(blockIdx.z * parts_here);
    const int block_heads = first_of((blockIdx.z + 1) * parts_here) - block_first;
    const VisitedTiles visited(length,
                               PASS == Pass::kNormalise && p.reduction == FASA_REDUCE_SAMPLED_SOFTMAX);
    const int octets = octets_of(length);
    const int begin = static_cast<int64_t>(visited.turns) * blockIdx.x / gridDim.x;
    const int end = heads == 0 ? begin : static_cast<int64_t>(visited.turns) * (blockIdx.x + 1) / gridDim.x;

    // The tiles that copies have reached run ahead of those that are scored; what the block table has for
    // them is read a turn earlier still.
    const Ring ring(shared + warp * Ring::kSize, p.labels, first_head, heads, length);
    const auto octet_of = [&](int turn) { return min(2 * visited[turn] + lane % 2, octets - 1); };
    const auto look_up = [&](int turn) { return key_offset(p.pool, seq, octet_of(turn) * kOctet); };
    const auto fetch = [&](uint32_t slot, int turn, int32_t offset) {
        uint32_t scales = 0;
        if (turn < end) {
            scales = ring.fetch(slot, visited[turn] * kTileTokens,
                                label_address_at(p.pool, p.labels, offset, octet_of(turn) * kOctet, 0));
        }
        close_copies();
        return scales;
    };
    const int first = begin + team;
    int32_t offsets[Ring::kAhead + 1];
#pragma unroll
    for (int i = 0; i <= Ring::kAhead; ++i) {
        offsets[i] = look_up(first + i * teams);
    }
    uint32_t scales[Ring::kAhead];
#pragma unroll
    for (int i = 0; i < Ring::kAhead; ++i) {
        scales[i] = fetch(i, first + i * teams, offsets[i]);
    }

    // While the first labels are on their way: the queries.
    const Queries queries(shared + kScoreWarps * Ring::kSize, block_heads + kHeads - 1);
    const auto first_slot = [&](int part_here) {  // each part has kSlices where PAIRS, else one for each head
        return (PAIRS ? part_here * kSlices : first_of(blockIdx.z * parts_here + part_here) - block_first) *
               Queries::kColumns;
    };
    // Of the block's KV head `head`: its part here, and its number in that.
    const auto place = [&](int head) {
        const int of = (parts * (block_first + head + 1) - 1) / kv_heads;
        return int2{static_cast<int>(of - blockIdx.z * parts_here), block_first + head - first_of(of)};
    };
    const auto slot_of = [&](int head, int member) {
        const int2 at = place(head);
        return first_slot(at.x) + Cut::slice(at.y) * Queries::kColumns + Cut::column(at.y, member);
    };
    const auto column_of = [&](int head, int member) { return Cut::column(place(head).y, member); };
    __shared__ float normalisers[PASS == Pass::kSoftmax ? 128 : 1];
    if constexpr (PASS == Pass::kSoftmax) {
        whole_normalisers(normalisers, p, scores, seq, tokens_seen(p, length), block_first * group,
                          block_heads * group);
    }
    queries.fill(p, scores, seq, block_first, block_heads, PASS == Pass::kSoftmax ? normalisers : nullptr,
                 PASS != Pass::kNormalise && blockIdx.x == 0, slot_of, column_of);
#pragma unroll
    for (int i = 0; i < Ring::kAhead - 1; ++i) {
        ring.put_scales(i, scales[i]);
    }
    uint32_t late_scales = scales[Ring::kAhead - 1];
    int32_t next_offset = offsets[Ring::kAhead];
    __syncthreads();

    // The logits of 16 tokens under the query heads of a slice.
    const int slots =
        first_slot(warp % parts_here) + within * 2;  // of this lane's columns of the first slice
    const auto multiply = [&](float (&logit)[COLUMNS][4], const char* stage, int slice) {
        typename Tile::Sum sum[COLUMNS][4];
        float2 factor[COLUMNS];
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
            const int slot = slots + slice * Queries::kColumns + n * kTileColumns;
            factor[n] = *reinterpret_cast<const float2*>(queries.factor + slot);
            const auto start = *reinterpret_cast<const typename Queries::Starts*>(queries.start + slot);
            sum[n][0] = sum[n][2] = start.x;
            sum[n][1] = sum[n][3] = start.y;
        }
#pragma unroll
        for (int h = slice; h < kHeads; h += kSlices) {
            const int matrix =
                h < heads ? first_head - block_first + h : block_heads;  // the last ones are zero
            Tile::multiply(sum, stage + h * Ring::kHead, queries.matrix + matrix * Queries::kMatrix);
        }
        const float2 scale = Ring::scales(stage, Cut::head(slice, within * 2));
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                logit[n][i] = Tile::value(sum[n][i]) * (i < 2 ? scale.x : scale.y) *
                              (i % 2 ? factor[n].y : factor[n].x);
            }
        }
    };
    Normaliser seen[kSlices][COLUMNS][2];
    const auto normalise = [&](const char* stage) {  // tokens beyond the end have NaN for a scale
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
            float logit[COLUMNS][4];
            multiply(logit, stage, s);
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) {
                seen[s][n][0].add({logit[n][0], logit[n][2]});
                seen[s][n][1].add({logit[n][1], logit[n][3]});
            }
        }
    };
    const int64_t first_query = static_cast<int64_t>(seq) * p.num_q_heads + first_head * group;
    const auto keys_per_head = [&](const char* stage, int tile) {
        constexpr int kTogether =
            kSlices / COLUMNS > 0 ? kSlices / COLUMNS : 1;  // more would not fit registers
#pragma unroll kTogether
        for (int s = 0; s < kSlices; ++s) {
            float logit[COLUMNS][4];
            multiply(logit, stage, s);
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) {
                const int column = n * kTileColumns + quad;
                const int head = Cut::head(s, column), member = Cut::member(column);
                store_columns(p, scores, length, 2 * tile, logit[n],
                              (first_query + head * group + member) * scores.octets + 2 * tile,
                              head < heads && member < group);
            }
        }
    };
    const auto keys_by_softmax = [&](const char* stage, int tile) {
        float sum[kSlices][2], peak[kSlices][2];
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
            float logit[COLUMNS][4];
            multiply(logit, stage, s);
            SoftmaxScore soft[2];
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) {
                const float2 normaliser = *reinterpret_cast<const float2*>(
                    queries.normaliser + slots + s * Queries::kColumns + n * kTileColumns);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    soft[half].add(logit[n][2 * half], normaliser.x);
                    soft[half].add(logit[n][2 * half + 1], normaliser.y);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[s][half] = soft[half].sum, peak[s][half] = soft[half].peak;
            }
        }
        // Lane `within` of four ends with the whole of head `within`.
        constexpr int kLanes = PAIRS ? 2 : 4;  // that hold parts of a head
        gather<kSlices, kLanes>(sum, [](float a, float b) { return a + b; });
        gather<kSlices, kLanes>(peak, [](float a, float b) { return fmaxf(a, b); });
        float score[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            score[half] = SoftmaxScore{sum[0][half], peak[0][half]}.value(p.reduction);
            if (PAIRS && kSlices == 1) {  // lanes 0 and 1 have head 0, lanes 2 and 3 head 1
                score[half] = __shfl_sync(0xffffffff, score[half], 4 * quad + within % 2 * 2);
            }
        }
        const int64_t row = static_cast<int64_t>(seq) * kv_heads + first_head + quad / 2;
        store_tiles(p, scores, length, 2 * tile, score, row * scores.octets + 2 * tile + quad % 2,
                    quad / 2 < heads);
    };

    uint32_t slot = 0;
    for (int tile = first; tile < end; tile += teams) {
        wait_for_copies<Ring::kAhead - 1>();
        __syncwarp();  // what others copied is here, and they are done with the slot that makes room
        const auto slot_after = [&](uint32_t turns) { return (slot + turns) % Ring::kDepth; };
        const int ahead = tile + Ring::kAhead * teams;
        ring.put_scales(slot_after(Ring::kAhead - 1), late_scales);
        late_scales = fetch(slot_after(Ring::kAhead), ahead, next_offset);
        next_offset = look_up(ahead + teams);
        const char* stage = ring.stage(slot);
        if constexpr (PASS == Pass::kNormalise) {
            normalise(stage);
        } else if constexpr (PASS == Pass::kSoftmax) {
            keys_by_softmax(stage, tile);
        } else {
            keys_per_head(stage, tile);
        }
        slot = slot_after(1);
    }
    wait_for_copies<0>();
    if constexpr (PASS == Pass::kNormalise) {
        __syncthreads();
        auto* sums = reinterpret_cast<float (*)[kHeads * Queries::kColumns]>(shared);  // where the rings were
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
#pragma unroll
            for (int i = 0; i < 2 * COLUMNS; ++i) {
                Normaliser& mine = seen[s][i / 2][i % 2];
                mine.merge_lanes(4, kWarp / 2);
                if (quad == 0) {
                    sums[warp][s * Queries::kColumns + i / 2 * kTileColumns + within * 2 + i % 2] =
                        mine.log2_sum();
                }
            }
        }
        __syncthreads();
        for (int at = lane; team == 0 && at < kSlices * Queries::kColumns; at += kWarp) {
            const int column = at % Queries::kColumns, member = Cut::member(column);
            const int head = Cut::head(at / Queries::kColumns, column);
            Normaliser all;
            for (int t = 0; t < teams; ++t) {
                all.add({sums[warp + t * parts_here][at]});
            }
            if (head < heads && member < group) {
                scores.partials[(static_cast<int64_t>(seq) * scores.parts + blockIdx.x) * p.num_q_heads +
                                (first_head + head) * group + member] = all.log2_sum();
            }
        }
    }
}

}  // namespace fasa
