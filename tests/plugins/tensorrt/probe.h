// An object of each interface of a V3 plugin, each of whose methods answers with a number of its own, and
// what a caller hears from them: compiled on either side against TensorRT's headers or ours, the numbers show
// whether both sides find each method in the same place.
#pragma once

#include "tensorrt.h"

namespace probe {

using namespace nvinfer1;

inline char const* text(int number) {
    static char const* const texts[] = {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"};
    return texts[number];
}

inline char places[10];

template <typename T>
T* address(int number) {
    return reinterpret_cast<T*>(places + number);
}

struct Core : IPluginV3OneCore {
    char const* getPluginName() const noexcept override { return text(1); }
    char const* getPluginVersion() const noexcept override { return text(2); }
    char const* getPluginNamespace() const noexcept override { return text(3); }
};

struct Build : IPluginV3OneBuild {
    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t a, DynamicPluginTensorDesc const* out,
                            int32_t b) noexcept override {
        return 100 + 10 * a + b + static_cast<int32_t>(in->max.d[7] + out->opt.d[7]);
    }
    int32_t getOutputDataTypes(DataType* types, int32_t a, DataType const* in,
                               int32_t b) const noexcept override {
        types[0] = in[0];
        return 200 + 10 * a + b;
    }
    int32_t getOutputShapes(DimsExprs const* in, int32_t a, DimsExprs const*, int32_t b, DimsExprs* out,
                            int32_t c, IExprBuilder&) noexcept override {
        *out = *in;
        return 300 + 10 * a + b + c;
    }
    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const*, int32_t,
                                   int32_t) noexcept override {
        return position == 4;
    }
    int32_t getNbOutputs() const noexcept override { return 5; }
    size_t getWorkspaceSize(DynamicPluginTensorDesc const*, int32_t a, DynamicPluginTensorDesc const*,
                            int32_t b) const noexcept override {
        return (size_t{6} << 40) + a + b;
    }
    int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override {
        tactics[0] = 7;
        return count;
    }
    int32_t getNbTactics() noexcept override { return 8; }
    char const* getTimingCacheID() noexcept override { return text(9); }
    int32_t getFormatCombinationLimit() noexcept override { return 10; }
    char const* getMetadataString() noexcept override { return text(0); }
};

struct Runtime : IPluginV3OneRuntime {
    PluginField field{"field", "data", PluginFieldType::kINT64, 11};
    PluginFieldCollection fields{1, &field};

    int32_t setTactic(int32_t tactic) noexcept override { return 1000 + tactic; }
    int32_t onShapeChange(PluginTensorDesc const* in, int32_t a, PluginTensorDesc const* out,
                          int32_t b) noexcept override {
        return 2000 + 10 * a + b + static_cast<int32_t>(in->scale + out->scale);
    }
    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return 3000 + in->dims.nbDims + static_cast<int32_t>(out->type) + (inputs[0] == outputs[0]) +
               (workspace == stream);
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return address<IPluginV3>(4); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &fields; }
};

struct Plugin : IPluginV3 {
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        return address<IPluginCapability>(static_cast<int>(type) + 1);
    }
    IPluginV3* clone() noexcept override { return address<IPluginV3>(5); }
};

struct Creator : IPluginCreatorV3One {
    PluginFieldCollection fields{12, nullptr};

    IPluginV3* createPlugin(char const*, PluginFieldCollection const* given,
                            TensorRTPhase phase) noexcept override {
        return address<IPluginV3>(given->nbFields + static_cast<int>(phase));
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &fields; }
    char const* getPluginName() const noexcept override { return text(6); }
    char const* getPluginVersion() const noexcept override { return text(7); }
    char const* getPluginNamespace() const noexcept override { return text(8); }
};

}  // namespace probe
