// The part of TensorRT-LLM 1.2's executor.h that examples/cpp/trtllm_executor.cpp uses, declared by hand
// after cpp/include/tensorrt_llm/executor/{executor,types}.h, with a played executor: it counts up from the
// prompt's sum, two tokens a response, to the end id or max_tokens, and refuses prompts whose first token
// is 99.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace tensorrt_llm::executor {

using SizeType32 = int32_t;
using FloatType = float;
using TokenIdType = int32_t;
using VecTokens = std::vector<TokenIdType>;
using BeamTokens = std::vector<VecTokens>;
using IdType = uint64_t;
enum class ModelType { kDECODER_ONLY = 0, kENCODER_ONLY = 1, kENCODER_DECODER = 2 };

class SamplingConfig {
  public:
    explicit SamplingConfig(SizeType32 beamWidth = 1) : beams(beamWidth) {}
    SizeType32 beams;
};

class OutputConfig {
  public:
    explicit OutputConfig(bool = false, bool = false, bool = false, bool exclude = false)
        : excludeInputFromOutput(exclude) {}
    bool excludeInputFromOutput;
};

class KvCacheConfig {
  public:
    explicit KvCacheConfig(bool enableBlockReuse = true, const std::optional<SizeType32>& = std::nullopt)
        : reuse(enableBlockReuse) {}
    bool reuse;
};

class ExecutorConfig {
  public:
    explicit ExecutorConfig(SizeType32 = 1) {}
    void setKvCacheConfig(const KvCacheConfig& config) { reuse = config.reuse; }
    void setEnableChunkedContext(bool enable) { chunked = enable; }
    bool reuse = true, chunked = false;
};

class Request {
  public:
    Request(VecTokens inputTokenIds, SizeType32 maxTokens, bool streaming = false,
            const SamplingConfig& = SamplingConfig(), const OutputConfig& output = OutputConfig(),
            const std::optional<SizeType32>& endId = std::nullopt)
        : prompt(std::move(inputTokenIds)),
          left(maxTokens),
          good(streaming && output.excludeInputFromOutput),
          end(endId) {}
    VecTokens prompt;
    SizeType32 left;
    bool good;
    std::optional<SizeType32> end;
};

struct Result {
    bool isFinal;
    BeamTokens outputTokenIds;
};

class Response {
  public:
    Response(std::string error, Result result) : error_(std::move(error)), result_(std::move(result)) {}
    [[nodiscard]] bool hasError() const { return !error_.empty(); }
    [[nodiscard]] std::string getErrorMsg() const { return error_; }
    [[nodiscard]] Result getResult() const { return result_; }

  private:
    std::string error_;
    Result result_;
};

class Executor {
  public:
    Executor(const std::filesystem::path&, ModelType, const ExecutorConfig& config)
        : good_(config.chunked && !config.reuse) {}
    [[nodiscard]] IdType enqueueRequest(const Request& request) {
        request_.emplace(request);
        next_ = std::accumulate(request.prompt.begin(), request.prompt.end(), 0);
        return 7;
    }
    [[nodiscard]] std::vector<Response> awaitResponses(
        const IdType& id, const std::optional<std::chrono::milliseconds>& = std::nullopt) {
        if (id != 7 || !good_ || !request_->good || request_->prompt.at(0) == 99) {
            return {Response("the request is refused", {})};
        }
        Result result{false, {{}}};
        for (int i = 0; i < 2 && !result.isFinal; ++i) {
            result.outputTokenIds[0].push_back(next_);
            result.isFinal = --request_->left == 0 || next_ == request_->end;
            ++next_;
        }
        return {Response("", result)};
    }
    void shutdown() {}

  private:
    bool good_;
    std::optional<Request> request_;
    TokenIdType next_ = 0;
};

}  // namespace tensorrt_llm::executor
