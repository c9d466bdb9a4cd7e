// A warp's own ring of label tiles in shared memory: 16 tokens of up to kHeads neighbouring KV heads each,
// with their scales. Labels come by asynchronous copies; scales, which may lie at any two bytes, by way of
// registers, a turn later.
#pragma once

#include "async_copy.cuh"
#include "label_tile.cuh"
#include "score_tile.cuh"

namespace fasa {

template <class Tile>
struct TileRing {
    static constexpr int kBytes = Tile::kBytes;
    static constexpr int kHeads = kBytes <= 32 ? 4 : kBytes <= 64 ? 2 : 1;  // 128 bytes a token: a line
    static constexpr uint32_t kDepth = kBytes < 24 ? 6 : 3;                 // 5 to 7 KiB a warp
    static constexpr int kAhead = kDepth - 1;
    // A head's rows, then its scales: for each token of the first octet a pair with that of the second. The
    // distance between heads lets copies of a token's labels go to different banks.
    static constexpr int kScales = kTileTokens * kBytes;
    static constexpr int kHead = kScales + (kBytes < 32 ? 32 : kBytes);
    static constexpr int kStage = kHeads * kHead;
    static constexpr int kSize = kDepth * kStage;  // bytes of shared memory, a warp

    static constexpr int kPiece = kBytes % 16 ? 8 : 16;  // bytes of one copy
    static constexpr int kParts = kBytes / kPiece;
    static constexpr int kPieces = kOctet * kHeads * kParts;  // of an octet
    static constexpr int kRounds = (kPieces + kWarp - 1) / kWarp;

    const fasa_labels& labels;
    char* memory;
    int heads, length;
    int to[kRounds];          // of this lane's pieces of an octet, from the stage on; negative for none
    int64_t offset[kRounds];  // of theirs from the octet's first label
    int64_t scale_offset;     // of this lane's scale from the octet's first

    // For the KV heads `first_head` to `first_head + heads - 1` of a sequence.
    __device__ TileRing(char* memory, const fasa_labels& labels, int first_head, int heads, int length)
        : labels(labels), memory(memory), heads(heads), length(length) {
        const int lane = threadIdx.x % kWarp;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            const int piece = r * kWarp + lane, part = piece % kParts;
            const int head = piece / kParts % kHeads, token = piece / (kParts * kHeads);
            to[r] = token < kOctet && head < heads ? head * kHead + place(token, part) : -1;
            offset[r] = token * labels.label_token_stride + (first_head + head) * labels.label_head_stride +
                        part * kPiece;
        }
        scale_offset =
            lane / 4 * labels.scale_token_stride + (first_head + lane % 4) * labels.scale_head_stride;
    }

    __device__ char* stage(uint32_t slot) const { return memory + slot * kStage; }

    // Starts to fetch the tile that begins at token `first`: labels to `slot`, scales (a pair of float16) to
    // registers, NaN beyond the end of the sequence. Lanes 0 and 1 know the addresses of its two octets.
    __device__ uint32_t fetch(uint32_t slot, int first, const LabelAddress& octet) const {
        uint32_t scales = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const char* from = address(octet.label, half);
#pragma unroll
            for (int r = 0; r < kRounds; ++r) {
                if (to[r] >= 0) {
                    copy_async<kPiece>(stage(slot) + to[r] + half * kOctet * kBytes, from + offset[r]);
                }
            }
            const char* scale = Tile::kFloat ? nullptr : address(octet.scale, half);
            const int lane = threadIdx.x % kWarp;
            constexpr uint32_t kNan = 0x7fff, kOne = 0x3c00;
            uint32_t bits = Tile::kFloat ? kOne : kNan;
            if (first + half * kOctet + lane / 4 >= length) {
                bits = kNan;
            } else if (!Tile::kFloat && lane % 4 < heads) {
                bits = __ldg(reinterpret_cast<const uint16_t*>(scale + scale_offset));
            }
            scales |= bits << 16 * half;
        }
        return scales;
    }

    // Leaves in `slot` the scales that fetch() returned.
    __device__ void put_scales(uint32_t slot, uint32_t scales) const {
        const int lane = threadIdx.x % kWarp;
        if (lane % 4 < kHeads) {
            *reinterpret_cast<uint32_t*>(stage(slot) + lane % 4 * kHead + kScales + lane / 4 * 4) = scales;
        }
    }

    // Of head `head` of a stage: the scales of tokens lane / 4 and lane / 4 + 8.
    static __device__ float2 scales(const char* stage, int head) {
        return __half22float2(
            *reinterpret_cast<const __half2*>(stage + head * kHead + kScales + threadIdx.x % kWarp / 4 * 4));
    }

  private:
    static __device__ int place(int token, int part) {
        return kPiece == 16 ? Tile::place(token, part) : token * kBytes + part * kPiece;
    }
    static __device__ const char* address(const char* of_octet, int octet) {
        return reinterpret_cast<const char*>(
            __shfl_sync(0xffffffff, reinterpret_cast<uint64_t>(of_octet), octet));
    }
};

}  // namespace fasa
