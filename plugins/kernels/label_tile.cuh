// Labels as tensor-core fragments: the rows of 16 tokens (of one KV head) against query heads as columns.
//
// Idea: the order of dims inside a product is free as long as both sides agree. So a lane keeps the words
// that one wide read of shared memory brings it, whichever dims they hold, and the query is laid out to meet
// them. Half a nibble's byte is masked away, nothing is moved. INT4 and INT8 multiply bytes with 8-bit
// queries, to exact integers. FP8 becomes float16, which holds it exactly, against float16 queries.
#pragma once

#include <type_traits>

#include "labels.cuh"
#include "mma.cuh"

namespace fasa {

template <fasa_label_kind KIND, int BYTES>  // of a label, a multiple of 8
struct LabelTile {
    static constexpr bool kInt4 = KIND == FASA_LABELS_INT4, kFloat = KIND == FASA_LABELS_FP8;
    static constexpr int kBytes = BYTES;
    static constexpr int kDims = kInt4 ? 2 * BYTES : BYTES;
    // The four lanes of a row read kWidth words each out of every kSpan bytes. Rows are an odd number of
    // spans long, so that the rows that are read at a time lie in different banks (for 24 bytes: nearly);
    // those of 128 bytes exchange their two spans in every other row instead.
    static constexpr int kWidth = BYTES % 64 == 0 ? 4 : BYTES % 32 == 0 ? 2 : 1;
    static constexpr int kSpan = 16 * kWidth;
    static constexpr int kSpans = (BYTES + kSpan - 1) / kSpan;
    static constexpr bool kSwapped = kSpans % 2 == 0 && BYTES % kSpan == 0;
    static constexpr int kWords = kSpans * kWidth;  // of a row, in a lane
    static constexpr int kProducts = KIND == FASA_LABELS_INT8 ? (kWords + 1) / 2 : kWords;
    static constexpr int kPaddedDims = kProducts * (kFloat ? 16 : 32);  // those past kDims have zero queries
    static constexpr int kQueryWords = 2 * kProducts;                   // in a lane, for eight columns
    static constexpr int kQueryWidth = kQueryWords % 4 ? 2 : 4;         // words read together
    static constexpr int kQueryBytes = 4 * kWarp * kQueryWords;         // of eight columns
    using Sum = std::conditional_t<kFloat, float, int>;

    // An integer sum that starts here reads, as a float, 1.5 * 2^23 more than it is; it stays within 2^22.
    static constexpr int kIntegerBase = 0x4b400000;

    static __device__ float value(Sum sum) {
        if constexpr (kFloat) {
            return sum;
        } else {
            return __int_as_float(sum) - 12582912.f;
        }
    }

    // The byte at which part `part` (16 bytes) of row `row` lies, from the first row on.
    static __device__ int place(int row, int part) {
        return row * BYTES + 16 * (kSwapped ? part ^ row % 2 * (kSpan / 16) : part);
    }

    // The byte at which dim `dim` (an int8 or float16) of column `column` lies in a query of kQueryBytes.
    static __device__ int query_place(int dim, int column) {
        constexpr int kWordDims = kInt4 ? 8 : 4;
        const int word = dim / kWordDims, within = dim % kWordDims;
        const int held = word / (4 * kWidth) * kWidth + word % kWidth;  // the number of the word in its lane
        const int lane = 4 * column + word / kWidth % 4;
        // Low nibbles meet the first word of a pair, high ones the second; of FP8 so do the halves of a word.
        const int to = kInt4 ? 2 * held + within % 2 : kFloat ? 2 * held + within / 2 : held;
        const int byte = kInt4 ? within / 2 : kFloat ? within % 2 * 2 : within;
        return (to / kQueryWidth * kWarp + lane) * 4 * kQueryWidth + to % kQueryWidth * 4 + byte;
    }

    // Adds to sums [COLUMNS][16, 8] the products of 16 rows with COLUMNS queries of kQueryBytes; both lie in
    // shared memory.
    template <int COLUMNS>
    static __device__ void multiply(Sum (&sum)[COLUMNS][4], const char* rows, const char* query) {
        const int lane = threadIdx.x % kWarp;
        uint32_t low[kWords], high[kWords];  // of row lane / 4, and of the row eight further on
        read_row(low, rows + lane / 4 * BYTES);
        read_row(high, rows + (lane / 4 + kOctet) * BYTES);
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
            uint32_t q[kQueryWords];
#pragma unroll
            for (int i = 0; i < kQueryWords / kQueryWidth; ++i) {
                read_words<kQueryWidth>(q + i * kQueryWidth,
                                        query + n * kQueryBytes + (i * kWarp + lane) * 4 * kQueryWidth);
            }
#pragma unroll
            for (int i = 0; i < kProducts; ++i) {
                if constexpr (kInt4) {
                    mma_16x8x32(sum[n], low[i] & 0x0f0f0f0f, high[i] & 0x0f0f0f0f, low[i] >> 4 & 0x0f0f0f0f,
                                high[i] >> 4 & 0x0f0f0f0f, q[2 * i], q[2 * i + 1]);
                } else if constexpr (kFloat) {
                    mma_16x8x16<__half>(sum[n], two_halves(low[i]), two_halves(high[i]),
                                        two_halves(low[i] >> 16), two_halves(high[i] >> 16), q[2 * i],
                                        q[2 * i + 1]);
                } else {
                    const bool whole = 2 * i + 1 < kWords;
                    const int second = whole ? 2 * i + 1 : 0;
                    mma_16x8x32(sum[n], low[2 * i], high[2 * i], whole ? low[second] : 0,
                                whole ? high[second] : 0, q[2 * i], q[2 * i + 1]);
                }
            }
        }
    }

  private:
    template <int N>
    static __device__ void read_words(uint32_t* to, const char* from) {
        if constexpr (N == 4) {
            const uint4 x = *reinterpret_cast<const uint4*>(from);
            to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        } else if constexpr (N == 2) {
            const uint2 x = *reinterpret_cast<const uint2*>(from);
            to[0] = x.x, to[1] = x.y;
        } else {
            to[0] = *reinterpret_cast<const uint32_t*>(from);
        }
    }

    static __device__ void read_row(uint32_t (&word)[kWords], const char* row) {
        const int within = threadIdx.x % 4, odd = threadIdx.x / 4 % 2;
#pragma unroll
        for (int s = 0; s < kSpans; ++s) {
            // Past the end of a label, where queries are zero, its last words come again.
            const int mine = BYTES % 16 && s == kSpans - 1 ? within % 2 : within;
            const int span = kSwapped ? s ^ odd : s;
            read_words<kWidth>(word + s * kWidth, row + span * kSpan + mine * 4 * kWidth);
        }
    }

    static __device__ uint32_t two_halves(uint32_t two) {
        const __half2_raw x = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
        return x.x | static_cast<uint32_t>(x.y) << 16;
    }
};

}  // namespace fasa
