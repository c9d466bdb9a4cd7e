// FlashInfer's tiles are multiples of 64 elements wide. Rows of 96 get tiles of 128 whose last 32 columns are
// zero: this replaces, in the translation units for such a head_dim, the one class through which FlashInfer
// moves rows between global and shared memory. Include it before FlashInfer's own headers.
#pragma once

#include <flashinfer/permuted_smem.cuh>

namespace flashinfer {

template <>
struct smem_t<SwizzleMode::k128B> {
    static constexpr uint32_t kStride = 16;  // of a row, in units of 16 bytes
    static constexpr uint32_t kUsed = FASA_HEAD_DIM / 8;
    static_assert(kUsed > 8 && kUsed < kStride);

    b128_t* base;

    template <typename T>
    __device__ __forceinline__ smem_t(T* base) : base(reinterpret_cast<b128_t*>(base)) {}

    template <uint32_t stride>
    static __device__ __forceinline__ uint32_t get_permuted_offset(uint32_t row, uint32_t column) {
        static_assert(stride == kStride);
        return row * stride + (column ^ (row % 8));
    }

    template <uint32_t step>
    static __device__ __forceinline__ uint32_t advance_offset_by_column(uint32_t offset, uint32_t step_idx) {
        static_assert(step == 2 || step % 8 == 0);
        return step == 2 ? (offset ^ (2 + 4 * (step_idx % 2))) + (step_idx % 4 == 3) * 8 : offset + step;
    }

    template <uint32_t step, uint32_t stride>
    static __device__ __forceinline__ uint32_t advance_offset_by_row(uint32_t offset) {
        static_assert(stride == kStride && (step == 4 || step % 8 == 0));
        return (step == 4 ? offset ^ 4 : offset) + step * stride;
    }

    static __device__ __forceinline__ bool is_used(uint32_t offset) {
        return ((offset % kStride) ^ (offset / kStride % 8)) < kUsed;
    }

    __device__ __forceinline__ void ldmatrix_m8n8x4(uint32_t offset, uint32_t* fragment) {
        mma::ldmatrix_m8n8x4(fragment, base + offset);
    }
    __device__ __forceinline__ void ldmatrix_m8n8x4_trans(uint32_t offset, uint32_t* fragment) {
        mma::ldmatrix_m8n8x4_trans(fragment, base + offset);
    }
    __device__ __forceinline__ void stmatrix_m8n8x4(uint32_t offset, uint32_t* fragment) {
        mma::stmatrix_m8n8x4(fragment, base + offset);
    }

    // Zeroes what is not loaded, whatever the caller asks for. The 8 columns to the left are always in the
    // row.
    template <cp_async::SharedMemFillMode, typename T>
    __device__ __forceinline__ void load_128b_async(uint32_t offset, const T* source, bool is_wanted) {
        const bool used = is_used(offset);
        cp_async::pred_load_128b<cp_async::PrefetchMode::kPrefetch, cp_async::SharedMemFillMode::kFillZero>(
            base + offset, reinterpret_cast<const b128_t*>(used ? source : source - 64), is_wanted && used);
    }

    template <typename T>
    __device__ __forceinline__ void store_128b(uint32_t offset, T* target) {
        if (is_used(offset)) {
            *reinterpret_cast<b128_t*>(target) = base[offset];
        }
    }
};

}  // namespace flashinfer
