// One sequence through an engine of the plugin lowering in plain TensorRT: prefill in chunks, greedy decode.
//
//     tensorrt_embed ENGINE_DIR PLUGIN_LIBRARY MAX_NEW_TOKENS TOKEN...
//
// prints the ids of the new tokens. Bindings, KV pool and block offsets are explained in
// fasa_trt/core/contract.py. The pool holds one sequence, which owns blocks 0, 1, 2 and so on. Memory is
// given back when the process ends.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Ints = std::vector<int32_t>;

class Log : public nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kWARNING) {
            std::cerr << message << '\n';
        }
    }
};

void require(bool good, const std::string& problem) {
    if (!good) {
        throw std::runtime_error(problem);
    }
}

void require(cudaError_t status) {
    require(status == cudaSuccess, std::string("CUDA: ") + cudaGetErrorString(status));
}

std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    require(file.good(), "cannot read " + path);
    return {std::istreambuf_iterator<char>(file), {}};
}

// The numbers of a key of config.json, one or a list; none where the key is missing. Every key that is asked
// for is there once at most, so nothing has to be parsed around it.
Ints numbers(const std::string& config, const std::string& key) {
    const size_t at = config.find('"' + key + "\":");
    if (at == std::string::npos) {
        return {};
    }
    std::istringstream text(config.substr(at + key.size() + 3));
    Ints found;
    char mark = ',';
    if (text >> std::ws; text.peek() == '[') {
        text >> mark;
        for (int32_t value; text >> value;) {
            found.push_back(value);
            if (!(text >> mark) || mark == ']') {
                break;
            }
        }
    } else if (int32_t value; text >> value) {
        found.push_back(value);
    }
    return found;
}

int32_t number(const std::string& config, const std::string& key) {
    const Ints found = numbers(config, key);
    require(found.size() == 1, "config.json has no number " + key);
    return found[0];
}

template <typename T>
T* allocate(size_t count) {
    void* pointer = nullptr;
    require(cudaMalloc(&pointer, count * sizeof(T)));
    return static_cast<T*>(pointer);
}

nvinfer1::Dims shape(const std::vector<int64_t>& sizes) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), dims.d);
    return dims;
}

class Sequence {
  public:
    Sequence(nvinfer1::ICudaEngine& engine, const std::string& config)
        : context_(engine.createExecutionContext()),
          vocab_(number(config, "vocab_size")),
          max_tokens_(number(config, "max_num_tokens")),
          tokens_per_block_(number(config, "tokens_per_block")) {
        require(context_ != nullptr, "TensorRT makes no execution context");
        require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
        const int32_t length = number(config, "max_seq_len");
        logits_ = allocate<float>(vocab_);
        require(context_->setTensorAddress("logits", logits_), "logits");
        make_pools(config, (length + tokens_per_block_ - 1) / tokens_per_block_);
    }

    // Caches the prompt; the token after it.
    int32_t prefill(const Ints& prompt) {
        prompt_ = static_cast<int32_t>(prompt.size());
        const int32_t chunk = max_tokens_ - max_tokens_ % tokens_per_block_;  // chunks end with blocks
        int32_t next = 0;
        for (int32_t start = 0; start < prompt_; start += chunk) {
            const int32_t end = std::min(prompt_, start + chunk);
            next = step(Ints(prompt.begin() + start, prompt.begin() + end), 0);
        }
        return next;
    }

    // Caches one token; the token after it.
    int32_t decode(int32_t token) { return step({token}, 1); }

  private:
    // kind: 0 context, 1 generation, as in host_request_types.
    int32_t step(const Ints& tokens, int32_t kind) {
        const int32_t count = static_cast<int32_t>(tokens.size());
        length_ += count;
        const Ints context{kind == 0 ? count : prompt_};
        upload("input_ids", tokens, {count});
        upload("last_token_ids", {count}, {1});
        upload("context_lengths", context, {1});
        upload("sequence_length", {length_}, {1});
        bind("host_context_lengths", context, {1});
        bind("host_past_key_value_lengths", {length_ - kind}, {1});
        bind("host_request_types", {kind}, {1});
        require(context_->enqueueV3(stream_), "TensorRT cannot run this step");
        std::vector<float> logits(vocab_);
        require(
            cudaMemcpyAsync(logits.data(), logits_, vocab_ * sizeof(float), cudaMemcpyDeviceToHost, stream_));
        require(cudaStreamSynchronize(stream_));
        return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    }

    // Layers with equally many KV heads share a pool [blocks, layers, 2, heads, tokens per block, head_dim].
    void make_pools(const std::string& config, int32_t blocks) {
        Ints heads = numbers(config, "num_kv_heads_per_layer");
        if (heads.empty()) {
            heads.assign(number(config, "num_hidden_layers"), number(config, "num_key_value_heads"));
        }
        Ints kinds, counts, mapping;
        for (const int32_t head_count : heads) {
            const auto found = std::find(kinds.begin(), kinds.end(), head_count);
            const auto pool = found - kinds.begin();
            if (found == kinds.end()) {
                kinds.push_back(head_count);
                counts.push_back(0);
            }
            mapping.insert(mapping.end(), {static_cast<int32_t>(pool), counts[pool]++});
        }
        Ints offsets;
        for (size_t pool = 0; pool < kinds.size(); ++pool) {
            const size_t row = size_t(kinds[pool]) * tokens_per_block_ * number(config, "head_size");
            const size_t size = row * 2 * counts[pool] * blocks;
            auto* memory = allocate<uint16_t>(size);  // float16 or bfloat16
            require(cudaMemsetAsync(memory, 0, size * sizeof(uint16_t), stream_));
            pools_.insert(pools_.end(), {static_cast<int64_t>(reinterpret_cast<intptr_t>(memory)), 0});
            for (int32_t value = 0; value < 2; ++value) {
                for (int32_t block = 0; block < blocks; ++block) {
                    offsets.push_back(block * counts[pool] * 2 + value);
                }
            }
        }
        const int64_t pools = static_cast<int64_t>(kinds.size()), layers = static_cast<int64_t>(heads.size());
        require(context_->setInputShape("host_kv_cache_pool_pointers", shape({pools, 2})), "pool pointers");
        require(context_->setTensorAddress("host_kv_cache_pool_pointers", pools_.data()), "pool pointers");
        bind("host_kv_cache_pool_mapping", mapping, {layers, 2});
        upload("kv_cache_block_offsets", offsets, {pools, 1, 2, blocks});
    }

    // A tensor that only the plugin reads, on the host.
    void bind(const char* name, const Ints& values, const std::vector<int64_t>& sizes) {
        Ints& kept = host_[name];
        kept = values;
        require(context_->setInputShape(name, shape(sizes)), std::string("TensorRT does not take ") + name);
        require(context_->setTensorAddress(name, kept.data()), std::string("TensorRT does not take ") + name);
    }

    void upload(const char* name, const Ints& values, const std::vector<int64_t>& sizes) {
        int32_t*& memory = device_[name];
        if (memory == nullptr) {
            memory = allocate<int32_t>(std::max<size_t>(values.size(), max_tokens_));
        }
        const size_t size = values.size() * sizeof(int32_t);
        require(cudaMemcpyAsync(memory, values.data(), size, cudaMemcpyHostToDevice, stream_));
        require(cudaStreamSynchronize(stream_));  // the values go with the caller
        require(context_->setInputShape(name, shape(sizes)), std::string("TensorRT does not take ") + name);
        require(context_->setTensorAddress(name, memory), std::string("TensorRT does not take ") + name);
    }

    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    cudaStream_t stream_ = nullptr;
    int32_t vocab_, max_tokens_, tokens_per_block_;
    int32_t prompt_ = 0, length_ = 0;
    float* logits_ = nullptr;
    std::vector<int64_t> pools_;
    std::map<std::string, Ints> host_;
    std::map<std::string, int32_t*> device_;
};

void run(const std::string& directory, const char* plugin, int32_t max_new_tokens, const Ints& prompt) {
    const std::string config = read(directory + "/config.json");
    const int32_t most = number(config, "max_seq_len");
    require(static_cast<int32_t>(prompt.size()) < most, "the prompt does not fit this engine");
    Log log;
    std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(log));
    require(runtime != nullptr, "TensorRT does not start");
    nvinfer1::IPluginRegistry& registry = runtime->getPluginRegistry();
    registry.loadLibrary(plugin);  // silent when it fails
    require(registry.getCreator("FasaAttention", "1", "ai.fasa") != nullptr,
            std::string(plugin) + " has no plugin FasaAttention");
    const std::string plan = read(directory + "/rank0.engine");
    std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
    require(engine != nullptr, "TensorRT cannot load the engine: build it with this version, on this GPU");

    const Ints eos = numbers(config, "eos_token_ids");
    Sequence sequence(*engine, config);
    int32_t token = sequence.prefill(prompt);
    for (int32_t count = 1;; ++count) {
        std::cout << token << std::endl;
        const bool full = static_cast<int32_t>(prompt.size()) + count >= most;
        if (count >= max_new_tokens || full || std::count(eos.begin(), eos.end(), token) != 0) {
            return;
        }
        token = sequence.decode(token);
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 5) {
        std::cerr << "usage: tensorrt_embed ENGINE_DIR PLUGIN_LIBRARY MAX_NEW_TOKENS TOKEN...\n";
        return 2;
    }
    try {
        Ints prompt;
        for (int i = 4; i < argc; ++i) {
            prompt.push_back(std::stoi(argv[i]));
        }
        run(argv[1], argv[2], std::stoi(argv[3]), prompt);
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
}
