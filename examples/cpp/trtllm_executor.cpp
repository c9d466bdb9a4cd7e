// One request through TensorRT-LLM 1.2's Executor, streamed.
//
//     trtllm_executor ENGINE_DIR PLUGIN_LIBRARY MAX_NEW_TOKENS END_ID TOKEN...
//
// prints the ids of the new tokens. The library registers its plugin with the TensorRT of this process before
// the executor loads the engine; with several processes, each of them does.

#include <dlfcn.h>

#include <cstdint>
#include <exception>
#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "tensorrt_llm/executor/executor.h"
#include "tensorrt_llm/plugins/api/tllmPlugin.h"

namespace tle = tensorrt_llm::executor;

namespace {

void load_plugin(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
        throw std::runtime_error(std::string("the plugin library does not load: ") + dlerror());
    }
    const auto enter = reinterpret_cast<int32_t (*)(const char*)>(dlsym(library, "fasa_trt_register"));
    if (enter == nullptr || enter("libnvinfer.so.10") != 0) {
        throw std::runtime_error(std::string(path) + " does not register the plugin FasaAttention");
    }
}

void run(const char* engine, const char* plugin, int32_t max_new_tokens, int32_t end_id,
         tle::VecTokens prompt) {
    initTrtLlmPlugins();
    load_plugin(plugin);
    tle::ExecutorConfig config;
    // Without reuse of blocks: those of an answer were decoded sparsely, and would change later answers.
    config.setKvCacheConfig(tle::KvCacheConfig(false));
    config.setEnableChunkedContext(true);
    tle::Executor executor(engine, tle::ModelType::kDECODER_ONLY, config);

    tle::SamplingConfig greedy;
    tle::OutputConfig output;
    output.excludeInputFromOutput = true;
    const bool streaming = true;
    const auto request = executor.enqueueRequest(
        tle::Request(std::move(prompt), max_new_tokens, streaming, greedy, output, std::optional(end_id)));
    for (bool over = false; !over;) {
        for (const auto& response : executor.awaitResponses(request)) {
            if (response.hasError()) {
                throw std::runtime_error(response.getErrorMsg());
            }
            const auto result = response.getResult();
            for (const auto token : result.outputTokenIds.at(0)) {
                std::cout << token << std::endl;
            }
            over = over || result.isFinal;
        }
    }
    executor.shutdown();
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 6) {
        std::cerr << "usage: trtllm_executor ENGINE_DIR PLUGIN_LIBRARY MAX_NEW_TOKENS END_ID TOKEN...\n";
        return 2;
    }
    try {
        tle::VecTokens prompt;
        for (int i = 5; i < argc; ++i) {
            prompt.push_back(std::stoi(argv[i]));
        }
        run(argv[1], argv[2], std::stoi(argv[3]), std::stoi(argv[4]), prompt);
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
}
