// Reads the front of each row of 256 bytes, eight rows a unit, in the order of a list: what the score pass
// over prefixes asks of the memory, and nothing else of it.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kRows = 8, kRowBytes = 256;  // of a unit
constexpr uint32_t kNone = 0xffffffff;

// Instructions of a warp for a unit, when `lanes` lanes read a row, 16 bytes each.
__host__ __device__ constexpr int copies(int lanes) {
    return lanes <= kWarp / kRows ? 1 : lanes * kRows / kWarp;
}

// units: [steps, blocks of threads, warps, DEPTH], 2 KB each from `pool` on, or kNone. A warp has DEPTH of
// them on their way, into shared memory that nobody reads: each copy has a place of its own, for one that
// another would overwrite might not be made.
template <int DEPTH>
__global__ void __launch_bounds__(kThreads)
    read_pieces(const char* pool, const uint32_t* units, int steps, int lanes) {
    extern __shared__ uint4 ring[];  // [DEPTH, copies, kThreads]
    const int lane = threadIdx.x % kWarp, row = lane / lanes, part = lane % lanes;
    const int together = kWarp / lanes;  // rows an instruction
    const int warp = blockIdx.x * kWarps + threadIdx.x / kWarp, warps = gridDim.x * kWarps;
    const auto units_of = [&](int step) {  // a lane each
        return step < steps && lane < DEPTH
                   ? units[(static_cast<int64_t>(step) * warps + warp) * DEPTH + lane]
                   : kNone;
    };
    uint32_t next = units_of(0);
    for (int step = 0; step < steps; ++step) {
        const uint32_t mine = next;
        next = units_of(step + 1);
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const uint32_t unit = __shfl_sync(0xffffffff, mine, d);
            const char* from = pool + (static_cast<int64_t>(unit) * kRows + row) * kRowBytes + part * 16;
            auto to = static_cast<uint32_t>(
                __cvta_generic_to_shared(ring + d * copies(lanes) * kThreads + threadIdx.x));
            asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1));
            for (int first = 0; first < kRows; first += together) {
                if (unit != kNone && first + row < kRows) {
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to),
                                 "l"(from + first * kRowBytes));
                }
                to += kThreads * sizeof(uint4);
            }
            asm volatile("cp.async.commit_group;");
        }
    }
    asm volatile("cp.async.wait_all;");
}

}  // namespace

#ifdef _WIN32
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C" __attribute__((visibility("default")))
#endif

// bytes: 32, 64, 128 or 256, of each row; depth: 2, 4, 8 or 16. Returns a cudaError_t.
EXPORTED int read_pieces_of(const void* pool, const void* units, int steps, int bytes, int depth, int blocks,
                            void* stream) {
    const auto with = [&](auto kernel) {
        const int lanes = bytes / 16, shared = depth * copies(lanes) * kThreads * 16;
        const cudaError_t wrong =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (wrong != cudaSuccess) {
            return wrong;
        }
        kernel<<<blocks, kThreads, shared, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const char*>(pool), static_cast<const uint32_t*>(units), steps, lanes);
        return cudaGetLastError();
    };
    switch (depth) {
        case 2:
            return with(read_pieces<2>);
        case 4:
            return with(read_pieces<4>);
        case 8:
            return with(read_pieces<8>);
        default:
            return depth == 16 ? with(read_pieces<16>) : cudaErrorInvalidValue;
    }
}
