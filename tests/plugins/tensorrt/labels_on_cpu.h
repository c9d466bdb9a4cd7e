// Labels in plain loops, by the definitions in fasa.h: where they lie, and what is written there.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../../../plugins/tensorrt/step.h"

namespace {

using Row = std::vector<double>;

struct Label {
    uint8_t* codes;
    __half* scale;
};

Label label(const fasa_pool& pool, const fasa_labels& l, int seq, int token, int head) {
    const int32_t offset = pool.offsets[int64_t(seq) * 2 * pool.max_blocks + token / pool.tokens_per_block];
    const int64_t block = (offset & 0x7fffffff) / l.offset_divisor, slot = token % pool.tokens_per_block;
    const int64_t away = offset < 0 ? l.secondary_distance : 0;
    return {static_cast<uint8_t*>(l.labels) + away + block * l.label_block_stride +
                slot * l.label_token_stride + head * l.label_head_stride,
            reinterpret_cast<__half*>(static_cast<char*>(l.scales) + away + block * l.scale_block_stride +
                                      slot * l.scale_token_stride + head * l.scale_head_stride)};
}

void quantise(const fasa_labels& l, const Row& key, Label to) {
    float largest = 0;
    for (int d = 0; d < 2 * l.n_tip; ++d) {
        largest = std::max(largest, static_cast<float>(std::fabs(key[d])));
    }
    const int top = l.kind == FASA_LABELS_INT4 ? 7 : 127;
    const __half scale =
        __float2half(std::min(std::max(largest / static_cast<float>(top), 6.2e-5f), 65504.f));
    if (l.kind != FASA_LABELS_FP8) {
        *to.scale = scale;
    }
    const auto code = [&](int d) {
        const float x = std::nearbyint(static_cast<float>(key[d]) / __half2float(scale));
        return static_cast<int>(std::min(std::max(x, static_cast<float>(-top)), static_cast<float>(top)));
    };
    for (int d = 0; d < 2 * l.n_tip; ++d) {
        if (l.kind == FASA_LABELS_FP8) {
            to.codes[d] = __nv_cvt_float_to_fp8(static_cast<float>(key[d]), __NV_SATFINITE, __NV_E4M3);
        } else if (l.kind == FASA_LABELS_INT8) {
            to.codes[d] = static_cast<uint8_t>(code(d));
        } else {
            const int nibble = (code(d) + 8) << d % 2 * 4;
            to.codes[d / 2] = static_cast<uint8_t>(d % 2 ? to.codes[d / 2] | nibble : nibble);
        }
    }
}

Row dequantised(const fasa_labels& l, Label from) {
    Row row(2 * l.n_tip);
    for (int d = 0; d < 2 * l.n_tip; ++d) {
        if (l.kind == FASA_LABELS_FP8) {
            row[d] = __half2float(__half(__nv_cvt_fp8_to_halfraw(from.codes[d], __NV_E4M3)));
        } else {
            const int code = l.kind == FASA_LABELS_INT8 ? static_cast<int8_t>(from.codes[d])
                                                        : (from.codes[d / 2] >> d % 2 * 4 & 15) - 8;
            row[d] = code * double(__half2float(*from.scale));
        }
    }
    return row;
}

// Against integer labels, queries have 8 bits.
void quantise_query(const fasa_labels& l, Row& query) {
    if (l.kind != FASA_LABELS_INT4 && l.kind != FASA_LABELS_INT8) {
        return;
    }
    float largest = 1e-20f;
    for (int d = 0; d < 2 * l.n_tip; ++d) {
        largest = std::max(largest, static_cast<float>(std::fabs(query[d])));
    }
    const float step = largest / 127.f;
    for (int d = 0; d < 2 * l.n_tip; ++d) {
        query[d] = double(std::nearbyint(static_cast<float>(query[d]) / step)) * step;
    }
}

}  // namespace
