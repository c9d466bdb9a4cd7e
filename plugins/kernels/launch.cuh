// What the translation units of fasa_decode offer each other: one a head_dim keeps compile time apart.
#pragma once

#include "dense.cuh"

namespace fasa {

inline int token_sets(const fasa_decode_params& p) {
    return p.reduction == FASA_REDUCE_PER_HEAD ? p.num_q_heads : p.pool.num_kv_heads;
}

inline int device_attribute(cudaDeviceAttr which) {  // of the current device
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, which, device);
    return value;
}

inline int multiprocessors() {
    return device_attribute(cudaDevAttrMultiProcessorCount);
}

// Blocks of threads of the score pass, a sequence (and KV head, for PREFIX), and of the pass before it that
// finds the normalisers of the softmax reductions.
int score_blocks(const fasa_decode_params& p);
int normalise_blocks(const fasa_decode_params& p);

// The score pass, and what it calls for a label cache with reductions other than SUM.
fasa_status launch_score(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream);
fasa_status launch_score_heads(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream);

// Selection and attention, one block of threads for each (sequence, token set).
template <int HEAD_DIM>
fasa_status launch_attend(const fasa_decode_params& p, const Scores& scores, const Partials& partials,
                          cudaStream_t stream);

// Memory that a kernel writes and that the L2 cache should keep, as far as fasa_reserve_l2 made room for it.
struct Kept {
    void* base;
    size_t bytes;
};

cudaAccessPolicyWindow window_of(const Kept& kept);  // of 0 bytes where there is nothing to keep

// Launches `kernel` so that it may start while the kernel before it on the stream still runs, where the GPU
// can do that (compute capability 9.0 on); it must call wait_for_previous() before it reads what that one
// wrote. It may need more dynamic shared memory (`shared`, bytes) than it gets unasked.
template <typename... Parameters, typename... Arguments>
fasa_status launch_keeping(const Kept& kept, void (*kernel)(Parameters...), dim3 grid, int threads,
                           size_t shared, cudaStream_t stream, Arguments... arguments) {
    if (shared > 0 && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared)) != cudaSuccess) {
        return FASA_LAUNCH_FAILED;
    }
    cudaLaunchAttribute attributes[2] = {};
    unsigned count = 0;
    if (device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    const cudaAccessPolicyWindow window = window_of(kept);
    if (window.num_bytes > 0) {
        attributes[count].id = cudaLaunchAttributeAccessPolicyWindow;
        attributes[count++].val.accessPolicyWindow = window;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess ? FASA_OK : FASA_LAUNCH_FAILED;
}

template <typename... Parameters, typename... Arguments>
fasa_status launch_overlapped(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                              cudaStream_t stream, Arguments... arguments) {
    return launch_keeping({}, kernel, grid, threads, shared, stream, arguments...);
}

// The same for a score kernel: the keys and maxima that it leaves lie side by side and are kept.
template <typename... Parameters, typename... Arguments>
fasa_status launch_scoring(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                           cudaStream_t stream, const fasa_decode_params& p, const Scores& scores,
                           Arguments... arguments) {
    const uint16_t* end = scores.maxima + static_cast<size_t>(p.num_seqs) * token_sets(p) * scores.octets;
    const Kept kept{scores.keys, static_cast<size_t>(end - scores.keys) * sizeof(*end)};
    return launch_keeping(kept, kernel, grid, threads, shared, stream, p, scores, arguments...);
}

__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

}  // namespace fasa
