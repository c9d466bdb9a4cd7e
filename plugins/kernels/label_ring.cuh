// A warp's own ring of label batches in shared memory, filled by asynchronous copies.
//
// Idea: enough bytes must be in flight to hide the memory's latency, more than registers can hold, and each
// copy instruction of a warp must cover whole contiguous rows: the labels of all KV heads of a token lie side
// by side. The ring belongs to one warp, so no other barrier than the warp's is needed.
#pragma once

#include "async_copy.cuh"
#include "labels.cuh"

namespace fasa {

template <class Format>
struct LabelRing {
    static constexpr int kBytes = 4 * Format::kWords;
    static constexpr int kBatch = kBytes <= 32 ? 2 : 1;       // tokens of an octet copied together
    static constexpr int kBatches = kOctet / kBatch;          // that make an octet
    static constexpr int kDepth = kBytes <= 64 ? 4 : 2;       // batches in the ring; divides kBatches
    static constexpr int kPiece = kBytes % 16 == 0 ? 16 : 8;  // bytes of one copy
    static constexpr int kParts = kBytes / kPiece;
    // Eight rows read side by side must lie in different banks: rows of 2, 4 or 8 pieces exchange them
    // (swizzle), longer rows of an even number are padded.
    static constexpr bool kSwizzled = kPiece == 16 && (kParts == 2 || kParts == 4 || kParts == 8);
    static constexpr int kPitch = kBytes + (kBytes % 32 || kSwizzled ? 0 : 16);
    static constexpr int kStage = kBatch * kWarp * kPitch;
    static constexpr int kSize = kDepth * kStage;  // bytes of shared memory, a warp

    static __device__ int place(int row, int part) {  // of a piece, in bytes
        const int to = kSwizzled ? part ^ (row / (8 / kParts) & (kParts - 1)) : part;
        return row * kPitch + to * kPiece;
    }

    char* memory;
    int rows;                // labels of a token that the warp needs, for all its octets; at most 32
    int64_t offset[kParts];  // of this lane's pieces from an octet's first label
    int source[kParts];      // the lane that knows that octet's address
    const char* from[kParts];

    // The warp covers `teams` octets at a time with `heads` KV heads each; lane `heads` * t knows the address
    // of octet t.
    __device__ LabelRing(char* memory, const fasa_labels& labels, int teams, int heads)
        : memory(memory), rows(teams * heads) {
#pragma unroll
        for (int r = 0; r < kParts; ++r) {
            const int piece = r * kWarp + threadIdx.x % kWarp, row = min(piece / kParts, rows - 1);
            source[r] = row / heads * heads;
            offset[r] = row % heads * labels.label_head_stride + piece % kParts * kPiece;
        }
    }

    // From here on copies come from the octets at `address` (head 0's label of their first token).
    __device__ void set_octets(const char* address) {
#pragma unroll
        for (int r = 0; r < kParts; ++r) {
            from[r] = reinterpret_cast<const char*>(
                          __shfl_sync(0xffffffff, reinterpret_cast<uint64_t>(address), source[r])) +
                      offset[r];
        }
    }

    // Starts to copy batch `batch` of the current octets.
    __device__ void fetch(int batch, int64_t token_stride) {
        char* stage = memory + batch % kDepth * kStage;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
#pragma unroll
            for (int r = 0; r < kParts; ++r) {
                const int piece = r * kWarp + threadIdx.x % kWarp;
                if (piece < rows * kParts) {
                    copy_async<kPiece>(stage + i * kWarp * kPitch + place(piece / kParts, piece % kParts),
                                       from[r] + (batch * kBatch + i) * token_stride);
                }
            }
        }
    }

    // Row `row` of a batch that has arrived.
    __device__ void read(uint32_t (&label)[kBatch][Format::kWords], int batch, int row) const {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const char* stage = memory + batch % kDepth * kStage + i * kWarp * kPitch;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const char* at = stage + place(row, part);
                uint32_t* to = label[i] + part * (kPiece / 4);
                if constexpr (kPiece == 16) {
                    const uint4 x = *reinterpret_cast<const uint4*>(at);
                    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
                } else {
                    const uint2 x = *reinterpret_cast<const uint2*>(at);
                    to[0] = x.x, to[1] = x.y;
                }
            }
        }
    }
};

}  // namespace fasa
