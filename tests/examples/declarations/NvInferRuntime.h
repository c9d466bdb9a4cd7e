// The part of TensorRT's runtime that examples/cpp/tensorrt_embed.cpp calls, declared by hand after the
// headers of 10.14 and 11.1, with the engine of tests/simulated_engine.py behind it: what a slot of the pool
// holds depends on its token and on the slot before it, and the next token depends on all slots. Every
// layer's keys and values get the slot's number, and the last layer's values are what is read. BLOCK,
// HEAD_DIM and VOCAB come from the command line of the compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <map>
#include <string>
#include <vector>

inline void expect(bool good, const char* what) {
    if (!good) {
        std::cerr << "the engine was given something wrong: " << what << '\n';
        std::abort();
    }
}

namespace nvinfer1 {

struct Dims {
    static constexpr int32_t MAX_DIMS = 8;
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};

class ILogger {
  public:
    enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
    virtual void log(Severity severity, const char* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IPluginCreatorInterface {};

class IPluginRegistry {
  public:
    using PluginLibraryHandle = void*;
    PluginLibraryHandle loadLibrary(const char* path) noexcept {
        loaded_ = std::string(path) == "plugin";
        return nullptr;
    }
    IPluginCreatorInterface* getCreator(const char* name, const char* version, const char* space) noexcept {
        const bool known = std::string(name) + version + space == "FasaAttention1ai.fasa";
        return loaded_ && known ? &creator_ : nullptr;
    }

  private:
    bool loaded_ = false;
    IPluginCreatorInterface creator_;
};

class IExecutionContext {
  public:
    bool setInputShape(const char* name, const Dims& dims) noexcept {
        shapes_[name].assign(dims.d, dims.d + dims.nbDims);
        return true;
    }
    bool setTensorAddress(const char* name, void* data) noexcept {
        addresses_[name] = data;
        return true;
    }
    bool enqueueV3(cudaStream_t) noexcept {
        const int64_t tokens = shapes_.at("input_ids").at(0),
                      blocks = shapes_.at("kv_cache_block_offsets").at(3);
        const int32_t end = at<int32_t>("sequence_length"), kind = at<int32_t>("host_request_types");
        const int32_t past = end - static_cast<int32_t>(tokens);
        expect(at<int32_t>("last_token_ids") == tokens, "last_token_ids");
        expect(at<int32_t>("host_past_key_value_lengths") == end - kind, "host_past_key_value_lengths");
        expect(at<int32_t>("context_lengths") == at<int32_t>("host_context_lengths"), "context_lengths");
        expect(kind == 1 || at<int32_t>("context_lengths") == tokens, "context_lengths of a chunk");
        expect(kind == 0 || (at<int32_t>("context_lengths") <= past && tokens == 1),
               "context_lengths of a prompt");
        expect(past % BLOCK == 0 || kind == 1, "a chunk that ends within a block");
        expect((end + BLOCK - 1) / BLOCK <= blocks, "more tokens than blocks");
        int64_t before = past == 0 ? 0 : *slot(layers() - 1, 1, past - 1), sum = 0;
        for (int32_t i = 0; i < tokens; ++i) {
            before = (before * 1000003 + at<int32_t>("input_ids", i) + 1) % 2147483647;
            for (int64_t layer = 0; layer < layers(); ++layer) {
                for (int32_t value = 0; value < 2; ++value) {
                    *slot(layer, value, past + i) = static_cast<uint32_t>(before);
                }
            }
        }
        for (int32_t i = 0; i < end; ++i) {
            sum = (sum + (i + 1) * int64_t{*slot(layers() - 1, 1, i)}) % 7919;
        }
        for (int32_t i = 0; i < VOCAB; ++i) {
            static_cast<float*>(addresses_.at("logits"))[i] = i == sum % VOCAB ? 1.0F : 0.0F;
        }
        return true;
    }

  private:
    template <typename T>
    T at(const char* name, int64_t index = 0) {
        return static_cast<T*>(addresses_.at(name))[index];
    }
    int64_t layers() { return shapes_.at("host_kv_cache_pool_mapping").at(0); }
    int64_t heads(int64_t pool) { return pool == 0 ? 2 : 3; }

    // A number in the place of a token's key (value 0) or value of a layer.
    uint32_t* slot(int64_t layer, int32_t value, int32_t token) {
        const int64_t pool = at<int32_t>("host_kv_cache_pool_mapping", 2 * layer);
        const int64_t inside = at<int32_t>("host_kv_cache_pool_mapping", 2 * layer + 1);
        const int64_t blocks = shapes_.at("kv_cache_block_offsets").at(3),
                      size = 2 * heads(pool) * BLOCK * HEAD_DIM;
        const int64_t offset =
            at<int32_t>("kv_cache_block_offsets", (2 * pool + value) * blocks + token / BLOCK);
        char* base = reinterpret_cast<char*>(at<int64_t>("host_kv_cache_pool_pointers", 2 * pool));
        return reinterpret_cast<uint32_t*>(base + (inside * 2 + offset) * size) + token % BLOCK;
    }

    std::map<std::string, std::vector<int64_t>> shapes_;
    std::map<std::string, void*> addresses_;
};

class ICudaEngine {
  public:
    IExecutionContext* createExecutionContext() noexcept { return new IExecutionContext; }
};

class IRuntime {
  public:
    IPluginRegistry& getPluginRegistry() noexcept { return registry_; }
    ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept {
        return std::string(static_cast<const char*>(blob), size) == "a plan" ? new ICudaEngine : nullptr;
    }

  private:
    IPluginRegistry registry_;
};

inline IRuntime* createInferRuntime(ILogger&) noexcept {
    return new IRuntime;
}

}  // namespace nvinfer1
