// Warps that attend to tokens together: of one block of threads, or of a cluster of blocks.
#pragma once

#include "block.cuh"
#include "cluster.cuh"

namespace fasa {

// WARPS warps whose results are merged: those of a block of threads from a multiple of WARPS on, who meet at
// a barrier of their own (`barrier`, 0 is __syncthreads()'s); or, of each of a cluster's `peers` blocks, the
// first WARPS / peers. The first block merges.
template <int WARPS>
struct Crew {
    static constexpr int kThreads = WARPS * kWarp;
    int barrier;
    int peers = 1, rank = 0;

    __device__ int thread() const { return threadIdx.x % kThreads; }
    __device__ bool attends() const { return thread() / kWarp * peers < WARPS; }
    __device__ int number() const { return thread() / kWarp * peers + rank; }  // of a warp that attends
    __device__ bool merges() const { return rank == 0; }
    __device__ void sync() const {
        if (peers > 1) {
            cluster_arrive();
            cluster_wait();
        } else {
            sync_block();
        }
    }
    __device__ void sync_block() const {  // those of this block alone
        asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
    }
};

}  // namespace fasa
