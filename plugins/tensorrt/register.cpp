// Registers the plugin with a TensorRT in the same process, for programs that have no setting to load plugin
// libraries, such as TensorRT-LLM's servers: preload this library (LD_PRELOAD) and set FASA_TRT_REGISTER to
// the name of TensorRT's own, or call fasa_trt_register. Everyone else lets TensorRT load it
// (IPluginRegistry::loadLibrary), which registers it too: do one of both.
#if !defined(_WIN32)

#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "fasa_attention.h"
#include "registry.h"

extern "C" FASA_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

int32_t fail(const std::string& what) {
    fasa::log_error(("cannot register: " + what).c_str());
    return 1;
}

template <typename Registry>
bool register_all(void* registry) {
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
    bool good = true;
    for (int32_t i = 0; i < count; ++i) {
        good =
            static_cast<Registry*>(registry)->registerCreator(*creators[i], fasa::kPluginNamespace) && good;
    }
    return good;
}

}  // namespace

// Loads TensorRT's library (libnvinfer.so.10) if the process has not yet, and registers the plugin with it. 0
// for success; otherwise a line on stderr says why not.
extern "C" FASA_API int32_t fasa_trt_register(const char* tensorrt_library) {
    void* library = dlopen(tensorrt_library, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        return fail(dlerror());
    }
    const auto version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    const auto registry = reinterpret_cast<void* (*)()>(dlsym(library, "getPluginRegistry"));
    if (version == nullptr || registry == nullptr) {
        return fail(std::string(tensorrt_library) + " is not TensorRT");
    }
    const int32_t number = version(), major = number / 10000;  // 101401 for 10.14.1
    if (major != 10 && major != 11) {
        return fail("TensorRT " + std::to_string(major) + " is not known, only 10 and 11");
    }
    const bool good =
        major == 10 ? register_all<fasa::Registry10>(registry()) : register_all<fasa::Registry11>(registry());
    return good ? 0 : fail("TensorRT refuses, perhaps because it is registered already");
}

namespace {

__attribute__((constructor)) void register_on_load() {
    const char* tensorrt_library = std::getenv("FASA_TRT_REGISTER");
    if (tensorrt_library != nullptr && tensorrt_library[0] != '\0') {
        fasa_trt_register(tensorrt_library);
    }
}

}  // namespace

#endif
