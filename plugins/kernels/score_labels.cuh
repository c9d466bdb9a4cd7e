// The score pass over a label cache: one 16-bit key for every cached token and token set.
//
// Idea: a decode step is bound by the bytes it reads, and this pass reads one short label of every token.
// Labels of all KV heads of a token lie side by side (token-major), so a warp lays its lanes over (octet of
// tokens, token set) with the token set running fastest and streams whole rows through a ring in shared
// memory (label_ring.cuh). A label costs 4 * WORDS bytes and WORDS (INT8) or 2 * WORDS (INT4) dp4a
// instructions. Bytes a token and KV head: label + 2 (scale) read, 2.25 a token set written. Limit: 128k
// tokens x batch 8, 8 KV heads, 4-bit n_tip 32: 285 MB + 19 MB, 70 us at 4.3 TB/s.
//
// The softmax reductions need each head's normaliser before the first key: a first pass finds it, a second
// reads the labels again. Keeping the first pass's logits instead would move as many bytes (4 a token and
// query head written and read, against 34 read again) and round them.
#pragma once

#include "label_ring.cuh"
#include "query.cuh"

namespace fasa {

constexpr int kScoreThreads = 256;
constexpr int kScoreWarps = kScoreThreads / kWarp;
constexpr int kSetsAtOnce = kWarp;  // token sets that one block of threads serves

enum class Pass { kKeys, kNormalise, kSoftmax };

template <class Format>
size_t score_labels_shared(int slots) {
    return kScoreWarps * (LabelRing<Format>::kSize + kLabelDims * sizeof(float)) +
           slots * (Format::kStride + 3) * sizeof(uint32_t);
}

// `all_sets` rows a sequence are scored, kSetsAtOnce of them by each block (blockIdx.z), each of `heads`
// slots (more than one for kSoftmax alone); a slot is the sum of `summed` query heads.
template <class Format, Pass PASS>
__global__ void __launch_bounds__(kScoreThreads, 2)
    score_labels(const __grid_constant__ fasa_decode_params p, const Scores scores, int all_sets, int heads,
                 int summed) {
    using Ring = LabelRing<Format>;
    constexpr int WORDS = Format::kWords;
    constexpr bool kScaled = !Format::kFloat;
    extern __shared__ __align__(16) char shared[];
    const int first_set = blockIdx.z * kSetsAtOnce, sets = min(kSetsAtOnce, all_sets - first_set);
    const int slots = sets * heads, first_slot = first_set * heads, all_slots = all_sets * heads;
    auto* packed = reinterpret_cast<uint32_t*>(shared + kScoreWarps * Ring::kSize);
    auto* factor = reinterpret_cast<float*>(packed + slots * Format::kStride);
    float* normaliser = factor + slots;
    auto* start = reinterpret_cast<typename Format::Sum*>(normaliser + slots);
    auto* raw = reinterpret_cast<float*>(start + slots);  // a warp's query before packing
    const int seq = blockIdx.y, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    allow_next();
    wait_for_previous();
    const int length = p.lengths[seq];
    if (length <= p.budget) {
        return;
    }

    const int teams = kWarp / sets, team = lane / sets, set = min(lane, teams * sets - 1) % sets;
    const int per_kv_head = all_sets / p.pool.num_kv_heads, kv_head = (first_set + set) / per_kv_head;
    const int first_head = first_set / per_kv_head;
    const int kv_heads = (first_set + sets - 1) / per_kv_head - first_head + 1;
    const int ring_row = min(team, teams - 1) * kv_heads + kv_head - first_head;
    const int64_t row = static_cast<int64_t>(seq) * all_sets + first_set + set;
    const int octets = (length + kOctet - 1) / kOctet;
    const int begin = static_cast<int64_t>(octets) * blockIdx.x / gridDim.x;
    const int end = static_cast<int64_t>(octets) * (blockIdx.x + 1) / gridDim.x;
    const int64_t token_stride = p.labels.label_token_stride;
    const int step = kScoreWarps * teams;

    // The octets that copies have reached run ahead of those that are scored; their addresses (looked up in
    // the block table) run ahead once more.
    Ring ring(shared + warp * Ring::kSize, p.labels, teams, kv_heads, first_head, sets);
    constexpr int kAhead = Ring::kDepth - 1;
    int fetched = begin + warp * teams;  // the first of the warp's octets
    const auto address = [&](int octet) {
        return label_address(p.pool, p.labels, seq, min(octet + team, end - 1) * kOctet, 0);
    };
    const int first_octet = fetched;
    LabelAddress next{}, scales_at{};
    if (first_octet < end) {
        next = address(first_octet);
        scales_at = next;
        ring.set_octets(next.label);
        next = address(first_octet + step);
    }
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
    // While the first labels are on their way: the queries.
    for (int slot = warp; slot < slots; slot += kScoreWarps) {
        float* query = raw + warp * kLabelDims;
        reduce_query(query, p, seq, (first_slot + slot) * summed, summed);
        const float scale = kScaled ? quantise_query(query, Format::kDims) : 1.f;
        Format::pack(packed + slot * Format::kStride, query);
        const float norm = PASS == Pass::kSoftmax
                               ? whole_normaliser(scores, seq, gridDim.x, p.num_q_heads, first_slot + slot)
                               : 0.f;
        const auto from = Format::start(query);
        if (lane == 0) {
            factor[slot] = scale * logit_factor(p);
            normaliser[slot] = norm;
            start[slot] = from;
        }
        if (blockIdx.x == 0 && PASS != Pass::kNormalise) {  // for whoever scores a token again
            const int64_t at = static_cast<int64_t>(seq) * all_slots + first_slot + slot;
            for (int d = lane; d < Format::kDims; d += kWarp) {
                scores.queries[at * kLabelDims + d] = query[d];
            }
            if (lane == 0) {
                scores.factors[at] = scale * logit_factor(p);
                scores.normaliser[at] = norm;
            }
        }
        __syncwarp();
    }
    __syncthreads();

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
    Normaliser seen;
    for (int octet = first_octet; octet < end; octet += step) {
        if (kScaled) {
            load_scales(scale_ahead, next.scale);
        }
        const LabelAddress after = address(octet + 2 * step);
        uint32_t key[kOctet], largest = kHidden;
        float logits[kOctet];
#pragma unroll
        for (int batch = 0; batch < Ring::kBatches; ++batch) {
            wait_for_copies<kAhead - 1>();
            __syncwarp();  // what others copied is here, and they are done with the batch that makes room
            fetch((batch + kAhead) % Ring::kBatches);
            constexpr int kBatch = Ring::kBatch;
            uint32_t label[kBatch][WORDS];
            ring.read(label, batch, ring_row);
            SoftmaxScore soft[kBatch];
            float score[kBatch];
            const auto multiply = [&](int slot) {
                typename Format::Sum sum[kBatch];
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    sum[i] = start[slot];
                }
                Format::multiply(sum, label, packed + slot * Format::kStride);
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    score[i] = static_cast<float>(sum[i]) *
                               (kScaled ? __half2float(scale[batch * kBatch + i]) : 1.f) * factor[slot];
                }
            };
            if constexpr (PASS == Pass::kSoftmax) {
                for (int h = 0; h < heads; ++h) {
                    multiply(set * heads + h);
#pragma unroll
                    for (int i = 0; i < kBatch; ++i) {
                        soft[i].add(score[i], normaliser[set * heads + h]);
                    }
                }
            } else {
                multiply(set);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int slot = batch * kBatch + i, token = (octet + team) * kOctet + slot;
                if constexpr (PASS == Pass::kNormalise) {
                    logits[slot] = token < length && octet + team < end ? score[i] : -INFINITY;
                } else {
                    const float value = PASS == Pass::kSoftmax ? soft[i].value(p.reduction) : score[i];
                    key[slot] = token_key(p, token, length, value);
                    largest = larger_key(largest, key[slot]);
                }
            }
        }
        if constexpr (PASS == Pass::kNormalise) {
            seen.add(logits);
        } else if (team < teams && octet + team < end) {
            reinterpret_cast<uint4*>(scores.keys)[row * scores.octets + octet + team] = {
                key[0] | key[1] << 16, key[2] | key[3] << 16, key[4] | key[5] << 16, key[6] | key[7] << 16};
            scores.maxima[row * scores.octets + octet + team] = static_cast<uint16_t>(largest);
        }
        next = after;
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
            scale[i] = scale_ahead[i];
        }
    }
    wait_for_copies<0>();
    if constexpr (PASS == Pass::kNormalise) {  // here a set is a query head
        __syncthreads();
        auto* part = reinterpret_cast<float2*>(shared);  // where the rings were
        part[threadIdx.x] = {seen.peak, seen.sum};
        __syncthreads();
        if (threadIdx.x < sets) {
            Normaliser all;
            for (int w = 0; w < kScoreWarps; ++w) {
                for (int t = 0; t < teams; ++t) {
                    all.merge(part[w * kWarp + t * sets + threadIdx.x]);
                }
            }
            scores.partials[(static_cast<int64_t>(seq) * gridDim.x + blockIdx.x) * p.num_q_heads + first_set +
                            threadIdx.x] = {all.peak, all.sum};
        }
    }
}

}  // namespace fasa
