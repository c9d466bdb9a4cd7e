// Plays TensorRT for a plugin library: C functions for ctypes that call the plugin as TensorRT does, through
// its interface. Compiled against TensorRT's headers or ours.
#include <dlfcn.h>

#include "tensorrt.h"

using namespace nvinfer1;

namespace {

using Creators = IPluginCreatorInterface* const*;

IPluginCreatorV3One* creator(Creators creators, int32_t i) {
    return static_cast<IPluginCreatorV3One*>(creators[i]);
}

template <typename T>
T* capability(IPluginV3* plugin, PluginCapabilityType type) {
    return static_cast<T*>(plugin->getCapabilityInterface(type));
}

IPluginV3OneBuild* build(IPluginV3* plugin) {
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

constexpr int kMost = 16;
struct Tensors {
    PluginTensorDesc fixed[kMost];
    DynamicPluginTensorDesc dynamic[kMost];
};

// The last of `count` tensors is the output. Nine numbers of shape each: rank and sizes.
Tensors tensors(int count, const int64_t* shapes, const int32_t* types, int32_t format) {
    Tensors all = {};
    for (int i = 0; i < count; ++i) {
        PluginTensorDesc& desc = all.fixed[i];
        desc.dims.nbDims = static_cast<int32_t>(shapes[9 * i]);
        for (int j = 0; j < desc.dims.nbDims; ++j) {
            desc.dims.d[j] = shapes[9 * i + 1 + j];
        }
        desc.type = static_cast<DataType>(types[i]);
        desc.format = static_cast<TensorFormat>(format);
        desc.scale = 1.f;
        all.dynamic[i] = {desc, desc.dims, desc.dims, desc.dims};
    }
    return all;
}

}  // namespace

extern "C" {

Creators load(const char* path, int32_t* count) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        return nullptr;
    }
    reinterpret_cast<void (*)(void*)>(dlsym(library, "setLoggerFinder"))(nullptr);
    return reinterpret_cast<Creators (*)(int32_t&)>(dlsym(library, "getCreators"))(*count);
}

const char* creator_text(Creators creators, int32_t i, int32_t what) {
    IPluginCreatorV3One* from = creator(creators, i);
    const char* texts[] = {from->getPluginName(), from->getPluginVersion(), from->getPluginNamespace(),
                           from->getInterfaceInfo().kind};
    return texts[what];
}

const PluginFieldCollection* field_names(Creators creators, int32_t i) {
    return creator(creators, i)->getFieldNames();
}

IPluginV3* create(Creators creators, int32_t i, const PluginFieldCollection* fields, int32_t phase) {
    return creator(creators, i)->createPlugin("layer", fields, static_cast<TensorRTPhase>(phase));
}

const char* plugin_text(IPluginV3* plugin, int32_t what) {
    auto* core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    const char* texts[] = {core->getPluginName(),
                           core->getPluginVersion(),
                           core->getPluginNamespace(),
                           plugin->getInterfaceInfo().kind,
                           core->getInterfaceInfo().kind,
                           build(plugin)->getInterfaceInfo().kind,
                           runtime(plugin)->getInterfaceInfo().kind};
    return texts[what];
}

IPluginV3* clone(IPluginV3* plugin) {
    return plugin->clone();
}

IPluginV3* attach(IPluginV3* plugin) {
    return runtime(plugin)->attachToContext(nullptr);
}

void destroy(IPluginV3* plugin) {
    delete plugin;
}

const PluginFieldCollection* serialised(IPluginV3* plugin) {
    return runtime(plugin)->getFieldsToSerialize();
}

int32_t num_outputs(IPluginV3* plugin) {
    return build(plugin)->getNbOutputs();
}

int32_t output_type(IPluginV3* plugin, const int32_t* types, int32_t inputs) {
    DataType out = {};
    const bool good =
        build(plugin)->getOutputDataTypes(&out, 1, reinterpret_cast<const DataType*>(types), inputs) == 0;
    return good ? static_cast<int32_t>(out) : -1;
}

// Whether the output's sizes are the expressions of q's; expressions are only handed through.
bool output_is_like_q(IPluginV3* plugin, int32_t inputs) {
    char places[kMost][2] = {}, builder = 0;
    DimsExprs in[kMost] = {}, out = {};
    for (int32_t i = 0; i < inputs; ++i) {
        in[i].nbDims = 2;
        for (int j = 0; j < 2; ++j) {
            in[i].d[j] = reinterpret_cast<const IDimensionExpr*>(&places[i][j]);
        }
    }
    const int32_t failed = build(plugin)->getOutputShapes(in, inputs, nullptr, 0, &out, 1,
                                                          *reinterpret_cast<IExprBuilder*>(&builder));
    return failed == 0 && out.nbDims == 2 && out.d[0] == in[0].d[0] && out.d[1] == in[0].d[1];
}

bool supports(IPluginV3* plugin, int32_t position, int32_t inputs, const int64_t* shapes,
              const int32_t* types, int32_t format) {
    const Tensors all = tensors(inputs + 1, shapes, types, format);
    return build(plugin)->supportsFormatCombination(position, all.dynamic, inputs, 1);
}

int32_t configure(IPluginV3* plugin, int32_t inputs, const int64_t* shapes, const int32_t* types) {
    const Tensors all = tensors(inputs + 1, shapes, types, 0);
    return build(plugin)->configurePlugin(all.dynamic, inputs, all.dynamic + inputs, 1);
}

size_t workspace(IPluginV3* plugin, int32_t inputs, const int64_t* shapes, const int32_t* types) {
    const Tensors all = tensors(inputs + 1, shapes, types, 0);
    return build(plugin)->getWorkspaceSize(all.dynamic, inputs, all.dynamic + inputs, 1);
}

int32_t change_shapes(IPluginV3* plugin, int32_t inputs, const int64_t* shapes, const int32_t* types) {
    const Tensors all = tensors(inputs + 1, shapes, types, 0);
    return runtime(plugin)->onShapeChange(all.fixed, inputs, all.fixed + inputs, 1);
}

int32_t enqueue(IPluginV3* plugin, int32_t inputs, const int64_t* shapes, const int32_t* types,
                const void* const* pointers, void* out, void* memory, void* stream) {
    const Tensors all = tensors(inputs + 1, shapes, types, 0);
    return runtime(plugin)->enqueue(all.fixed, all.fixed + inputs, pointers, &out, memory,
                                    static_cast<cudaStream_t>(stream));
}
}
