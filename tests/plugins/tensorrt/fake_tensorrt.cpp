// Pretends to be TensorRT's library as far as its plugin registry: with TensorRT's headers the registry is of
// their version, otherwise of the one that FAKE_MAJOR names.
#include <stdio.h>

#include "registry.h"

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginCreatorV3One;

namespace {

bool note(IPluginCreatorInterface& creator, char const* name_space) {
    auto& made = static_cast<IPluginCreatorV3One&>(creator);
    printf("registered %s %s %s\n", made.getPluginName(), made.getPluginVersion(), name_space);
    fflush(stdout);
    static int times = 0;
    return ++times == 1;
}

}  // namespace

#if FASA_TENSORRT_HEADERS

using namespace nvinfer1;

struct Registry : IPluginRegistry {
#if NV_TENSORRT_MAJOR == 10
    bool registerCreator(IPluginCreator&, char const*) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(char const*, char const*, char const*) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
#endif
    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(char const*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    bool registerCreator(IPluginCreatorInterface& creator, char const* name_space) noexcept override {
        return note(creator, name_space);
    }
    IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override { return nullptr; }
    IPluginCreatorInterface* getCreator(char const*, char const*, char const*) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return false; }
    IPluginResource* acquirePluginResource(char const*, IPluginResource*) noexcept override {
        return nullptr;
    }
    int32_t releasePluginResource(char const*) noexcept override { return 0; }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { return nullptr; }
};
constexpr int32_t kVersion = NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100;

#else

#if FAKE_MAJOR == 10
struct Registry : fasa::Registry10 {
    bool registerOldCreator(void*, char const*) noexcept override { return false; }
    void* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
    void* getPluginCreator(char const*, char const*, char const*) noexcept override { return nullptr; }
    bool deregisterOldCreator(void const*) noexcept override { return false; }
#else
struct Registry : fasa::Registry11 {
#endif
    void setErrorRecorder(void*) noexcept override {}
    void* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool) override {}
    void* loadLibrary(char const*) noexcept override { return nullptr; }
    void deregisterLibrary(void*) noexcept override {}
    bool registerCreator(IPluginCreatorInterface& creator, char const* name_space) noexcept override {
        return note(creator, name_space);
    }
};
constexpr int32_t kVersion = FAKE_MAJOR * 10000 + 1401;

#endif

extern "C" FAKE_API int32_t getInferLibVersion() noexcept {
    return kVersion;
}

#if FASA_TENSORRT_HEADERS
extern "C" FAKE_API IPluginRegistry* getPluginRegistry() noexcept {
#else
extern "C" FAKE_API Registry* getPluginRegistry() noexcept {
#endif
    static Registry registry;
    return &registry;
}
