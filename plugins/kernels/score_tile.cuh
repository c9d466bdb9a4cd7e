// What the score passes by tensor cores share: products of 16 tokens with the query heads of a group become
// keys. In a tile of products lane 4 * quad + within holds tokens quad (values 0, 1) and quad + 8 (values 2,
// 3) under columns 2 * within and 2 * within + 1.
#pragma once

#include "mma.cuh"
#include "query.cuh"

namespace fasa {

enum class Pass { kKeys, kNormalise, kSoftmax };

constexpr int kTileTokens = 2 * kOctet;
constexpr int kTileColumns = 8;
constexpr int kSampleEvery = 32;

// The tiles that a pass visits, in turns: all, or a sample of a sequence for SAMPLED_SOFTMAX (`sampled` in
// core/reference.py): every kSampleEvery-th and the last two.
struct VisitedTiles {
    int tiles, regular, turns;
    bool sampled;

    __host__ __device__ VisitedTiles(int length, bool sampled)
        : tiles((length + kTileTokens - 1) / kTileTokens),
          regular((tiles + kSampleEvery - 1) / kSampleEvery),
          turns(sampled ? regular + 2 : tiles),
          sampled(sampled) {}

    // The tile of a turn; one beyond the end where there is none, or it has had its turn.
    __device__ int operator[](int turn) const {
        if (!sampled) {
            return turn;
        }
        if (turn < regular) {
            return turn * kSampleEvery;
        }
        const int tile = tiles - 2 + turn - regular;
        return tile < 0 || tile % kSampleEvery == 0 ? tiles : tile;
    }
};

// Blocks of threads of score_heads that a multiprocessor holds, for groups of query heads.
__host__ __device__ constexpr int head_blocks(int group) {
    return group > kTileColumns ? 2 : 3;
}

// About how many tokens the first pass of a softmax reduction sees.
__device__ inline int tokens_seen(const fasa_decode_params& p, int length) {
    return min(length, kTileTokens * VisitedTiles(length, p.reduction == FASA_REDUCE_SAMPLED_SOFTMAX).turns);
}

// Combines values [TILES][2] that LANES neighbouring lanes hold parts of: afterwards the first of lane t %
// TILES is tile t's.
template <int TILES, int LANES = 4, typename Combine>
__device__ inline void gather(float (&value)[TILES][2], Combine combine) {
    const int within = threadIdx.x % 4;
#pragma unroll
    for (int step = 1, tiles = TILES; step < LANES; step *= 2, tiles = max(tiles / 2, 1)) {
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

// Writes eight octets of keys and their maxima. A lane gives the keys of token `quad` of octets 2 * within
// and 2 * within + 1 (the upper half), and where octet `quad` lies in scores.keys, in octets, if it is
// `wanted`.
__device__ inline void store_octets(const Scores& scores, uint32_t keys, int64_t to, bool wanted) {
    const int within = threadIdx.x % 4;
    const uint32_t two = transpose_8x8(keys);  // tokens 2 * within and 2 * within + 1 of octet `quad`
    uint32_t largest = larger_pair(two, two >> 16 | two << 16);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        largest = larger_pair(largest, __shfl_xor_sync(0xffffffff, largest, step));
    }
    if (wanted) {
        reinterpret_cast<uint32_t*>(scores.keys)[to * (kOctet / 2) + within] = two;
        if (within == 0) {
            scores.maxima[to] = static_cast<uint16_t>(largest);
        }
    }
}

// Writes the keys of a tile whose columns are rows of keys of their own; `to` as above for the tile's first
// octet in the row of column `quad`.
__device__ inline void store_columns(const fasa_decode_params& p, const Scores& scores, int length, int octet,
                                     const float (&score)[4], int64_t to, bool wanted) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = (octet + half) * kOctet + threadIdx.x % kWarp / 4;
        const ScoreRange range(p, token, length);
        const uint32_t keys = key_pair(range.clamp(score[2 * half]), range.clamp(score[2 * half + 1]));
        store_octets(scores, keys, to + half, wanted);
    }
}

// Writes the keys of tiles that are one row of keys each. A lane gives the scores of tokens `quad` and
// `quad + 8` of tile `within`, which begins at `octet`; `to` and `wanted` as above, of octet `quad % 2` of
// tile `quad / 2`.
__device__ inline void store_tiles(const fasa_decode_params& p, const Scores& scores, int length, int octet,
                                   const float (&score)[2], int64_t to, bool wanted) {
    const int token = octet * kOctet + threadIdx.x % kWarp / 4;
    const uint32_t keys = key_pair(ScoreRange(p, token, length).clamp(score[0]),
                                   ScoreRange(p, token + kOctet, length).clamp(score[1]));
    store_octets(scores, keys, to, wanted);
}

}  // namespace fasa
