// A cluster of blocks of threads: its barrier, and sums sent to the first block's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fasa {

// The barrier of a cluster's threads: all that have not returned arrive, and what they wrote before can be
// read behind cluster_wait().
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
// The same where it matters that they have started, not what they wrote: much quicker.
__device__ inline void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

__device__ inline uint32_t shared_address(const void* here) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(here));
}

// Where the first block has what lies `here` in this one's shared memory. Volatile, lest the compiler work
// out the addresses of all that is to be sent long before, and run out of registers.
__device__ inline uint32_t in_first_block(const void* here) {
    uint32_t there = shared_address(here);
#if __CUDA_ARCH__ >= 900
    asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"(there));
#endif
    return there;
}

// Sends a value to the first block: `to` and its mailbox's barrier as in_first_block() tells them.
__device__ inline void send(uint32_t to, const float4& value, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::
            "r"(to),
        "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
        : "memory");
#endif
}
__device__ inline void send(uint32_t to, float value, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
                 "f"(value), "r"(barrier)
                 : "memory");
#endif
}

// In shared memory of a cluster's first block, which waits here for what the others send. That is all it
// waits for: plain stores to another block's memory need the cluster's barrier, and several hundred cycles
// more.
struct Mailbox {
    uint64_t barrier;
    uint32_t turn;

    // By one thread, before the cluster's barrier: for the first `bytes`.
    __device__ void open(uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
        turn = 0;
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
        expect(bytes);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    // By one thread, when all have waited for those before.
    __device__ void reopen(uint32_t bytes) {
        turn ^= 1;
        expect(bytes);
    }
    // By one warp, before a barrier of its block; by all of it, for one thread alone takes 0.7 us longer.
    // racecheck records every try: if all warps tried, or tried again at once, it would hardly let through
    // what they wait for.
    __device__ void wait() const {
#if __CUDA_ARCH__ >= 900
        constexpr uint32_t kPatience = 10'000'000;  // ns of a try
        uint32_t there;
        do {
            asm volatile(
                "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;"
                " selp.u32 %0, 1, 0, p;}"
                : "=r"(there)
                : "r"(shared_address(&barrier)), "r"(turn), "r"(kPatience)
                : "memory");
        } while (!there);
#endif
    }

  private:
    __device__ void expect(uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
                     "r"(bytes)
                     : "memory");
#endif
    }
};

}  // namespace fasa
