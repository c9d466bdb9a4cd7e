// Query heads as the columns of label tiles, in shared memory: eight to a matrix, COLUMNS matrices to a KV
// head. Against INT4 and INT8 labels a head is quantised to 8 bits; against FP8 it becomes float16, after
// division by a power of two.
//
// Groups of at most four leave half of the columns empty. Two KV heads then share one tile of products: the
// matrix of one has zeros where the other's query heads are, so that their products add up side by side, and
// what follows costs half as much. (Not with FP8, where a label can be NaN, which zero does not silence.)
#pragma once

#include "label_tile.cuh"
#include "score_tile.cuh"

namespace fasa {

__device__ inline float element(fasa_dtype dtype, const void* array, int64_t i) {
    return dtype == FASA_FLOAT16 ? to_float(static_cast<const __half*>(array)[i])
                                 : to_float(static_cast<const __nv_bfloat16*>(array)[i]);
}

// The tiles of products (slices) of HEADS KV heads of which a warp scores the same tokens, and whose query
// heads their columns are.
template <int HEADS, bool PAIRS>
struct Slices {
    static constexpr int kCount = PAIRS ? HEADS / 2 : HEADS;
    static constexpr int kMembers = kTileColumns / 2;  // of a group, where PAIRS

    static __device__ int head(int slice, int column) {
        return PAIRS ? slice + column / kMembers * kCount : slice;
    }
    static __device__ int member(int column) { return PAIRS ? column % kMembers : column; }
    static __device__ int slice(int head) { return PAIRS ? head % kCount : head; }
    static __device__ int column(int head, int member) {
        return PAIRS ? head / kCount * kMembers + member : member;
    }
};

template <class Tile, int COLUMNS>
struct HeadQueries {
    static constexpr int kColumns = COLUMNS * kTileColumns;
    static constexpr int kMatrix = COLUMNS * Tile::kQueryBytes;  // bytes of a KV head's queries
    static constexpr int kLanes = 8;                             // that prepare a query head together
    static constexpr int kDimsAtOnce = 8;                        // that each of them loads at once
    static constexpr int kRounds = (Tile::kPaddedDims + kLanes * kDimsAtOnce - 1) / (kLanes * kDimsAtOnce);
    using Sum = typename Tile::Sum;
    using Starts = std::conditional_t<Tile::kFloat, float2, int2>;  // of neighbouring columns

    char* matrix;       // [KV heads][COLUMNS][Tile::kQueryBytes]
    float* factor;      // [slices][kColumns]: on the products
    float* normaliser;  // the same shape, like what follows
    Sum* start;         // of a sum of products
    int room;           // for KV heads, and for slices

    static size_t bytes(int room) {
        return static_cast<size_t>(room) * (kMatrix + kColumns * 3 * sizeof(float));
    }
    __device__ HeadQueries(char* memory, int room)
        : matrix(memory),
          factor(reinterpret_cast<float*>(memory + room * kMatrix)),
          normaliser(factor + room * kColumns),
          start(reinterpret_cast<Sum*>(normaliser + room * kColumns)),
          room(room) {}

    // Prepares the query heads of `kv_heads` KV heads from `first` on, with their `normalisers` (or NULL); by
    // all threads of the block. `slot_of` says where in factor and the like a member of a head belongs, and
    // `column_of` which column of its head's matrices it is. `keep`: also for whoever scores a token again.
    // Columns without a query head are zero and count for nothing.
    template <typename Slot, typename Column>
    __device__ void fill(const fasa_decode_params& p, const Scores& scores, int seq, int first, int kv_heads,
                         const float* normalisers, bool keep, Slot slot_of, Column column_of) const {
        for (int i = threadIdx.x; i < room * kMatrix / 16; i += kScoreThreads) {
            reinterpret_cast<uint4*>(matrix)[i] = {0, 0, 0, 0};
        }
        for (int i = threadIdx.x; i < room * kColumns; i += kScoreThreads) {
            factor[i] = 0.f, normaliser[i] = INFINITY, start[i] = Sum{};
        }
        __syncthreads();
        const int group = p.num_q_heads / p.pool.num_kv_heads, queries = kv_heads * group;
        const int member = threadIdx.x % kLanes;
        for (int base = 0; base < queries; base += kScoreThreads / kLanes) {
            const int at = base + threadIdx.x / kLanes;
            const int query = min(at, queries - 1);
            const int64_t head = static_cast<int64_t>(seq) * p.num_q_heads + first * group + query;
            float code[kRounds][kDimsAtOnce];
            const float scale = load(code, p, head);
            int total = 0;
#pragma unroll
            for (int r = 0; r < kRounds; ++r) {
#pragma unroll
                for (int i = 0; i < kDimsAtOnce; ++i) {
                    total += Tile::kInt4 ? static_cast<int>(code[r][i]) : 0;
                }
            }
            total = sum_of_lanes(total);
            const float norm = normalisers == nullptr ? 0.f : normalisers[query];
            if (at >= queries) {
                continue;
            }
            const int column = column_of(query / group, query % group);
            put(matrix + query / group * kMatrix + column / kTileColumns * Tile::kQueryBytes, code,
                column % kTileColumns);
            if (member == 0) {
                const int slot = slot_of(query / group, query % group);
                factor[slot] = scale * logit_factor(p);
                normaliser[slot] = norm;
                start[slot] =
                    Tile::kFloat ? Sum{} : Sum(Tile::kIntegerBase - 8 * total);  // codes are stored + 8
            }
            if (keep) {
#pragma unroll
                for (int r = 0; r < kRounds; ++r) {
                    const int dim = (r * kLanes + member) * kDimsAtOnce;
                    if (dim < Tile::kDims) {
                        auto* kept = reinterpret_cast<float4*>(scores.queries + head * kLabelDims + dim);
                        kept[0] = {code[r][0], code[r][1], code[r][2], code[r][3]};
                        kept[1] = {code[r][4], code[r][5], code[r][6], code[r][7]};
                    }
                }
                if (member == 0) {
                    scores.factors[head] = scale * logit_factor(p);
                    scores.normaliser[head] = norm;
                }
            }
        }
    }

  private:
    // This lane's share of a query head, in units of the scale that is returned; zeros past the label.
    static __device__ float load(float (&code)[kRounds][kDimsAtOnce], const fasa_decode_params& p,
                                 int64_t head) {
        float largest = 1e-20f;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            const int dim = (r * kLanes + threadIdx.x % kLanes) * kDimsAtOnce;
            uint4 words = {0, 0, 0, 0};
            if (dim < Tile::kDims) {
                words = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.q) +
                                                             head * p.pool.head_dim + dim));
            }
            const uint32_t pairs[] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < kDimsAtOnce; ++i) {
                code[r][i] = element(p.pool.dtype, pairs, i);
                largest = fmaxf(largest, fabsf(code[r][i]));
            }
        }
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, step));
        }
        const float scale =
            Tile::kFloat ? __uint_as_float(__float_as_uint(largest) & 0x7f800000) : largest / 127.f;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
#pragma unroll
            for (int i = 0; i < kDimsAtOnce; ++i) {
                const float x = code[r][i] / scale;
                code[r][i] = Tile::kFloat ? x : static_cast<float>(max(-127, min(127, __float2int_rn(x))));
            }
        }
        return scale;
    }

    static __device__ void put(char* to, const float (&code)[kRounds][kDimsAtOnce], int column) {
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            const int dim = (r * kLanes + threadIdx.x % kLanes) * kDimsAtOnce;
            if (dim < Tile::kPaddedDims) {
#pragma unroll
                for (int i = 0; i < kDimsAtOnce; ++i) {
                    char* at = to + Tile::query_place(dim + i, column);
                    if constexpr (Tile::kFloat) {
                        *reinterpret_cast<__half*>(at) = __float2half_rn(code[r][i]);
                    } else {
                        *at = static_cast<char>(static_cast<int>(code[r][i]));
                    }
                }
            }
        }
    }

    static __device__ int sum_of_lanes(int x) {
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
            x += __shfl_xor_sync(0xffffffff, x, step);
        }
        return x;
    }
};

}  // namespace fasa
