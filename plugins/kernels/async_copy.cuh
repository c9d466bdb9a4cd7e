// Copies from global to shared memory that run on while the thread works (compute capability 8.0 on).
#pragma once

#include <cstdint>

namespace fasa {

// BYTES (8 or 16), aligned to their number on both sides.
template <int BYTES>
__device__ inline void copy_async(void* shared, const void* global) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES)
                     : "memory");
    }
}

// Closes a group of this thread's copies.
__device__ inline void close_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most LEFT of this thread's groups are under way; other threads see them after a barrier.
template <int LEFT>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

}  // namespace fasa
