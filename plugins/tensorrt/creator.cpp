// Makes FasaAttention plugins, and hands the creator to whoever loads the library.
#include <new>

#include "config.h"
#include "fasa_attention.h"

namespace fasa {
namespace {

class Creator : public nvinfer1::IPluginCreatorV3One {
  public:
    // The values of the fields that are listed mean nothing: parsers look at names and types.
    Creator() : fields_(fields_of(defaults_)) {
        for (nvinfer1::PluginField& field : fields_) {
            field.data = nullptr;
        }
        collection_.nbFields = static_cast<int32_t>(fields_.size());
        collection_.fields = fields_.data();
    }

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override {
        const std::string of = std::string("cannot create ") + (name != nullptr ? name : "a layer") + ": ";
        if (fields == nullptr) {
            log_error((of + "no attributes").c_str());
            return nullptr;
        }
        LayerConfig config;
        const std::string wrong = parse(*fields, config);
        if (!wrong.empty()) {
            log_error((of + wrong).c_str());
            return nullptr;
        }
        return new (std::nothrow) FasaAttention(config, phase);
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  private:
    LayerConfig defaults_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_;
};

}  // namespace
}  // namespace fasa

// TensorRT asks for these two by name when it loads a plugin library.
extern "C" FASA_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static fasa::Creator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

extern "C" FASA_API void setLoggerFinder(void* /* finder */) {}  // see log_error
