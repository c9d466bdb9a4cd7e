// The row and the position of every packed token, from the lengths on the device: a captured graph follows
// them.
#include <cuda_runtime.h>

#include "step.h"

namespace fasa {
namespace {

constexpr int kThreads = 256;

// A block of threads for each context sequence, then one for each kThreads generating ones.
__global__ __launch_bounds__(kThreads) void list(const int32_t* sequence_length,
                                                 const int32_t* context_lengths, int num_contexts,
                                                 int context_tokens, int num_seqs, int32_t* sequence,
                                                 int32_t* position) {
    const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    if (block >= num_contexts) {
        const int i = (block - num_contexts) * kThreads + thread;
        if (num_contexts + i < num_seqs) {
            sequence[context_tokens + i] = num_contexts + i;
            position[context_tokens + i] = sequence_length[num_contexts + i] - 1;
        }
        return;
    }
    __shared__ int first;
    if (thread == 0) {
        first = 0;
    }
    __syncthreads();
    int before = 0;
    for (int i = thread; i < block; i += kThreads) {
        before += context_lengths[i];
    }
    atomicAdd(&first, before);
    __syncthreads();
    const int count = context_lengths[block], past = sequence_length[block] - count;
    for (int i = thread; i < count && first + i < context_tokens; i += kThreads) {
        sequence[first + i] = block;
        position[first + i] = past + i;
    }
}

}  // namespace

bool list_tokens(const int32_t* sequence_length, const int32_t* context_lengths, int32_t num_contexts,
                 int32_t context_tokens, int32_t num_seqs, int32_t* sequence, int32_t* position,
                 void* stream) {
    const int blocks = num_contexts + (num_seqs - num_contexts + kThreads - 1) / kThreads;
    list<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        sequence_length, context_lengths, num_contexts, context_tokens, num_seqs, sequence, position);
    return cudaGetLastError() == cudaSuccess;
}

}  // namespace fasa
