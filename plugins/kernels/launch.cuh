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

// Selection and attention, a block of threads or a cluster for each (sequence, token set).
template <int HEAD_DIM>
fasa_status launch_attend(const fasa_decode_params& p, const Scores& scores, const Partials& partials,
                          cudaStream_t stream);

// Over memory that a kernel writes and that the L2 cache should keep, as far as fasa_reserve_l2 made room for
// it; of 0 bytes where there is nothing to keep.
cudaAccessPolicyWindow window_of(void* base, size_t bytes);

// What a launch asks for beside the usual: programmatic dependence where the GPU has it (compute capability
// 9.0 on), so that the kernel may start while the one before it on the stream still runs.
class LaunchAttributes {
  public:
    LaunchAttributes() {
        if (device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
            add(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed =
                1;
        }
    }
    void keep(void* base, size_t bytes) {
        const cudaAccessPolicyWindow window = window_of(base, bytes);
        if (window.num_bytes > 0) {
            add(cudaLaunchAttributeAccessPolicyWindow).accessPolicyWindow = window;
        }
    }
    void cluster(int blocks) {
        if (blocks > 1) {
            add(cudaLaunchAttributeClusterDimension).clusterDim = {static_cast<unsigned>(blocks), 1, 1};
        }
    }
    void give(cudaLaunchConfig_t& config) {
        config.attrs = attributes_;
        config.numAttrs = count_;
    }

  private:
    cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
        attributes_[count_].id = id;
        return attributes_[count_++].val;
    }
    cudaLaunchAttribute attributes_[2] = {};
    unsigned count_ = 0;
};

template <typename... Parameters, typename... Arguments>
fasa_status launch_with(LaunchAttributes attributes, void (*kernel)(Parameters...), dim3 grid, int threads,
                        size_t shared, cudaStream_t stream, Arguments... arguments) {
    if (shared > 0 && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared)) != cudaSuccess) {
        return FASA_LAUNCH_FAILED;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    attributes.give(config);
    return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess ? FASA_OK : FASA_LAUNCH_FAILED;
}

// Launches `kernel`, which must call wait_for_previous() before it reads what the kernel before it wrote. It
// may need more dynamic shared memory (`shared`, bytes) than it gets unasked.
template <typename... Parameters, typename... Arguments>
fasa_status launch_overlapped(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                              cudaStream_t stream, Arguments... arguments) {
    return launch_with({}, kernel, grid, threads, shared, stream, arguments...);
}

// The same in clusters of `blocks` blocks of threads, along x.
template <typename... Parameters, typename... Arguments>
fasa_status launch_clustered(int blocks, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                             cudaStream_t stream, Arguments... arguments) {
    LaunchAttributes attributes;
    attributes.cluster(blocks);
    return launch_with(attributes, kernel, grid, threads, shared, stream, arguments...);
}

// The same for a score kernel: the keys and maxima that it leaves lie side by side and are kept.
template <typename... Parameters, typename... Arguments>
fasa_status launch_scoring(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                           cudaStream_t stream, const fasa_decode_params& p, const Scores& scores,
                           Arguments... arguments) {
    const uint16_t* end = scores.maxima + static_cast<size_t>(p.num_seqs) * token_sets(p) * scores.octets;
    LaunchAttributes attributes;
    attributes.keep(scores.keys, static_cast<size_t>(end - scores.keys) * sizeof(*end));
    return launch_with(attributes, kernel, grid, threads, shared, stream, p, scores, arguments...);
}

__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

// In this order, so that all that is older than a kernel is there before the next one starts: lengths and
// block tables, which no kernel here writes, can be read before the wait. (Selection lets the next one start
// at once, which does not break that: it starts itself only when the score pass has waited.)
__device__ inline void wait_and_allow_next() {
    wait_for_previous();
    allow_next();
}

}  // namespace fasa
