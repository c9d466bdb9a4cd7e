// The part of CUDA's runtime that examples/cpp/tensorrt_embed.cpp calls, in host memory.
#pragma once

#include <cstdlib>
#include <cstring>

enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
constexpr unsigned cudaStreamNonBlocking = 1;
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t) {
    return "no error";
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) {
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** pointer, size_t size) {
    *pointer = std::malloc(size);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t) {
    std::memset(pointer, value, size);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, size);
    return cudaSuccess;
}
