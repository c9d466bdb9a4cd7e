// fasa_reserve_l2: room in the L2 cache for what a step leaves there between its kernels.
#include <algorithm>

#include "launch.cuh"

namespace fasa {

cudaAccessPolicyWindow window_of(void* base, size_t bytes) {
    cudaAccessPolicyWindow window = {};
    size_t room = 0;
    if (bytes == 0) {
        return window;
    }
    if (cudaDeviceGetLimit(&room, cudaLimitPersistingL2CacheSize) != cudaSuccess) {
        cudaGetLastError();  // a device without such a limit: nothing is kept
        return window;
    }
    const size_t most = device_attribute(cudaDevAttrMaxAccessPolicyWindowSize);
    window.num_bytes = room == 0 ? 0 : std::min(bytes, most);
    window.base_ptr = base;
    // More than there is room for would displace itself: a part of the lines stays instead.
    window.hitRatio =
        window.num_bytes > room ? static_cast<float>(room) / static_cast<float>(window.num_bytes) : 1.f;
    window.hitProp = cudaAccessPropertyPersisting;
    window.missProp = cudaAccessPropertyNormal;
    return window;
}

}  // namespace fasa

extern "C" fasa_status fasa_reserve_l2(void) {
    using namespace fasa;
    const size_t wanted = std::min(device_attribute(cudaDevAttrL2CacheSize) / 8 * 3,
                                   device_attribute(cudaDevAttrMaxPersistingL2CacheSize));
    size_t room = 0;
    if (wanted > 0 && cudaDeviceGetLimit(&room, cudaLimitPersistingL2CacheSize) == cudaSuccess &&
        (room >= wanted || cudaDeviceSetLimit(cudaLimitPersistingL2CacheSize, wanted) == cudaSuccess)) {
        return FASA_OK;
    }
    cudaGetLastError();  // it is not the caller's
    return FASA_UNSUPPORTED;
}
