// Warps that attend to tokens together: of one block of threads, or of a cluster of blocks.
#pragma once

#include "block.cuh"

namespace fasa {

// The barrier of a cluster's threads: all that have not returned arrive, and what they wrote before can be
// read behind cluster_wait().
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same place in the shared memory of the cluster's first block.
template <typename T>
__device__ T& of_first_block(T& here) {
#if __CUDA_ARCH__ >= 900
    return *static_cast<T*>(__cluster_map_shared_rank(&here, 0));
#else
    return here;
#endif
}

// WARPS warps whose results are merged: those of a block of threads from a multiple of WARPS on, who meet at
// a barrier of their own (`barrier`, 0 is __syncthreads()'s); or, of each of a cluster's `peers` blocks, the
// first WARPS / peers. The first block merges.
template <int WARPS>
struct Crew {
    static constexpr int kThreads = WARPS * kWarp;
    int barrier;
    int peers = 1, rank = 0;

    __device__ int thread() const { return threadIdx.x % kThreads; }
    __device__ bool attends() const { return thread() / kWarp < WARPS / peers; }
    __device__ int number() const { return thread() / kWarp * peers + rank; }  // of a warp that attends
    __device__ bool merges() const { return rank == 0; }
    __device__ void sync() const {
        if (peers > 1) {
            cluster_arrive();
            cluster_wait();
        } else {
            asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
        }
    }
};

}  // namespace fasa
