// What the translation units of fasa_decode offer each other: one a head_dim keeps compile time apart.
#pragma once

#include "common.cuh"

namespace fasa {

inline int token_sets(const fasa_decode_params& p) {
    return p.reduction == FASA_REDUCE_PER_HEAD ? p.num_q_heads : p.pool.num_kv_heads;
}

int multiprocessors();  // of the current device

// Blocks of threads of the score pass, a sequence (and KV head, for PREFIX), and of the pass before it that
// finds the normalisers of the softmax reductions.
int score_blocks(const fasa_decode_params& p);
int normalise_blocks(const fasa_decode_params& p);

// The score pass, and what it calls for a label cache with reductions other than SUM.
fasa_status launch_score(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream);
fasa_status launch_score_heads(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream);

// Selection and attention, one block of threads for each (sequence, token set).
template <int HEAD_DIM>
fasa_status launch_attend(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream);

// Launches `kernel` so that it may start while the kernel before it on the stream still runs, where the GPU
// can do that (compute capability 9.0 on); it must call wait_for_previous() before it reads what that one
// wrote.
template <typename... Parameters, typename... Arguments>
fasa_status launch_overlapped(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                              cudaStream_t stream, Arguments... arguments) {
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = major >= 9 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess ? FASA_OK : FASA_LAUNCH_FAILED;
}

// The same for a kernel that may need more dynamic shared memory than it gets unasked.
template <typename... Parameters, typename... Arguments>
fasa_status launch_with_shared(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                               cudaStream_t stream, Arguments... arguments) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared))
               ? FASA_LAUNCH_FAILED
               : launch_overlapped(kernel, grid, threads, shared, stream, arguments...);
}

__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

}  // namespace fasa
