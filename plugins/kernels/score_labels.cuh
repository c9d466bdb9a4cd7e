// The score pass over a label cache where a group's query heads are summed: one 16-bit key for every cached
// token and KV head.
//
// Idea: a decode step is bound by the bytes it reads, and this pass reads one short label of every token.
// Labels of all KV heads of a token lie side by side (token-major), so a warp lays its lanes over (octet of
// tokens, KV head) with the KV head running fastest and streams whole rows through a ring in shared memory
// (label_ring.cuh). A label costs 4 * WORDS bytes and WORDS (INT8) or 2 * WORDS (INT4) dp4a instructions.
// Bytes a token and KV head: label + 2 (scale) read, 2.25 written. Limit: 128k tokens x batch 8, 8 KV heads,
// 4-bit n_tip 32: 285 MB + 19 MB, 70 us at 4.3 TB/s.
#pragma once

#include "label_ring.cuh"
#include "launch.cuh"
#include "query.cuh"

namespace fasa {

template <class Format>
size_t score_labels_shared(int kv_heads) {
    return kScoreWarps * (LabelRing<Format>::kSize + kLabelDims * sizeof(float)) +
           kv_heads * (Format::kStride + 2) * sizeof(uint32_t);
}

template <class Format>
__global__ void __launch_bounds__(kScoreThreads, 2)
    score_labels(const __grid_constant__ fasa_decode_params p, const Scores scores) {
    using Ring = LabelRing<Format>;
    constexpr int WORDS = Format::kWords;
    constexpr bool kScaled = !Format::kFloat;
    extern __shared__ __align__(16) char shared[];
    const int kv_heads = p.pool.num_kv_heads, group = p.num_q_heads / kv_heads;
    auto* packed = reinterpret_cast<uint32_t*>(shared + kScoreWarps * Ring::kSize);
    auto* factor = reinterpret_cast<float*>(packed + kv_heads * Format::kStride);
    auto* start = reinterpret_cast<typename Format::Sum*>(factor + kv_heads);
    auto* raw = reinterpret_cast<float*>(start + kv_heads);  // a warp's query before packing
    const int seq = blockIdx.y, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    // Before the wait: what wait_and_allow_next() says is older than the last kernel.
    const int length = p.lengths[seq];
    const int teams = kWarp / kv_heads, team = lane / kv_heads, ring_row = min(lane, teams * kv_heads - 1);
    const int kv_head = ring_row % kv_heads;
    const int64_t row = static_cast<int64_t>(seq) * kv_heads + kv_head;
    const int octets = octets_of(length);
    const int begin = static_cast<int64_t>(octets) * blockIdx.x / gridDim.x;
    const int end = static_cast<int64_t>(octets) * (blockIdx.x + 1) / gridDim.x;
    const int64_t token_stride = p.labels.label_token_stride;
    const int step = kScoreWarps * teams;

    // The octets that copies have reached run ahead of those that are scored; their addresses (looked up in
    // the block table) run ahead once more.
    Ring ring(shared + warp * Ring::kSize, p.labels, teams, kv_heads);
    constexpr int kAhead = Ring::kDepth - 1;
    int fetched = begin + warp * teams;  // the first of the warp's octets
    const auto address = [&](int octet) {
        return label_address(p.pool, p.labels, seq, min(octet + team, end - 1) * kOctet, 0);
    };
    const int first_octet = fetched;
    LabelAddress scales_at{}, next{};
    if (first_octet < end) {
        scales_at = address(first_octet);
        next = address(first_octet + step);
    }
    wait_and_allow_next();
    if (length <= p.budget) {
        return;
    }
    // Asked for before the labels, or they would queue behind them.
    QueryShare share(p, seq, min(warp, kv_heads - 1) * group, group);
    ring.set_octets(scales_at.label);
    const auto fetch = [&](int batch) {
        if (fetched < end) {
            ring.fetch(batch, token_stride);
        }
        close_copies();
        if (batch == Ring::kBatches - 1) {
            fetched += step;
            if (fetched < end) {
                ring.set_octets(next.label);
            }
        }
    };
#pragma unroll
    for (int batch = 0; batch < kAhead; ++batch) {
        fetch(batch);
    }
    __half scale[kOctet], scale_ahead[kOctet];
    const auto load_scales = [&](__half(&to)[kOctet], const char* from) {
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
            to[i] = __ldg(reinterpret_cast<const __half*>(from + kv_head * p.labels.scale_head_stride +
                                                          i * p.labels.scale_token_stride));
        }
    };
    if (kScaled && first_octet < end) {
        load_scales(scale, scales_at.scale);
    }
    // While the first labels are on their way: the queries.
    for (int head = warp; head < kv_heads; head += kScoreWarps) {
        float* query = raw + warp * kLabelDims;
        if (head != warp) {
            share = QueryShare(p, seq, head * group, group);
        }
        share.store(query, p.labels.n_tip);
        const float scale = kScaled ? quantise_query(query, Format::kDims) : 1.f;
        Format::pack(packed + head * Format::kStride, query);
        const auto from = Format::start(query);
        if (lane == 0) {
            factor[head] = scale * logit_factor(p);
            start[head] = from;
        }
        if (blockIdx.x == 0) {  // for whoever scores a token again
            const int64_t at = static_cast<int64_t>(seq) * kv_heads + head;
            for (int d = lane; d < Format::kDims; d += kWarp) {
                scores.queries[at * kLabelDims + d] = query[d];
            }
            if (lane == 0) {
                scores.factors[at] = scale * logit_factor(p);
                scores.normaliser[at] = 0.f;
            }
        }
        __syncwarp();
    }
    __syncthreads();

    float score[kOctet];
    const auto score_batch = [&](int batch) {
        constexpr int kBatch = Ring::kBatch;
        uint32_t label[kBatch][WORDS];
        ring.read(label, batch, ring_row);
        typename Format::Sum sum[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            sum[i] = start[kv_head];
        }
        Format::multiply(sum, label, packed + kv_head * Format::kStride);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = batch * kBatch + i;
            score[at] =
                static_cast<float>(sum[i]) * (kScaled ? __half2float(scale[at]) : 1.f) * factor[kv_head];
        }
    };
    for (int octet = first_octet; octet < end; octet += step) {
        if (kScaled) {
            load_scales(scale_ahead, next.scale);
        }
        const LabelAddress after = address(octet + 2 * step);
#pragma unroll
        for (int batch = 0; batch < Ring::kBatches; ++batch) {
            wait_for_copies<kAhead - 1>();
            __syncwarp();  // what others copied is here, and they are done with the batch that makes room
            fetch((batch + kAhead) % Ring::kBatches);
            score_batch(batch);
        }
        if (team < teams && octet + team < end) {
#pragma unroll
            for (int i = 0; i < kOctet; ++i) {
                score[i] = ScoreRange(p, (octet + team) * kOctet + i, length).clamp(score[i]);
            }
            const uint4 keys = {key_pair(score[0], score[1]), key_pair(score[2], score[3]),
                                key_pair(score[4], score[5]), key_pair(score[6], score[7])};
            const uint32_t largest = larger_pair(larger_pair(keys.x, keys.y), larger_pair(keys.z, keys.w));
            reinterpret_cast<uint4*>(scores.keys)[row * scores.octets + octet + team] = keys;
            scores.maxima[row * scores.octets + octet + team] =
                static_cast<uint16_t>(larger_pair(largest, largest >> 16));
        }
        next = after;
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
            scale[i] = scale_ahead[i];
        }
    }
    wait_for_copies<0>();
}

}  // namespace fasa
