// Calls every method of the probe's objects, and writes a line for each, then the layout of every struct.
#include <stddef.h>
#include <stdio.h>

#include <initializer_list>

#include "tensorrt.h"

using namespace nvinfer1;

extern "C" void* probe_make(int which);
extern "C" void* probe_address(int number);

namespace {

int number_of(const void* address) {
    for (int i = 0; i < 10; ++i) {
        if (probe_address(i) == address) {
            return i;
        }
    }
    return -1;
}

void show(const char* name, long long number) {
    printf("%s %lld\n", name, number);
}

void about(const char* name, const IVersionedInterface& object) {
    const InterfaceInfo info = object.getInterfaceInfo();
    printf("%s '%s' %d %d, language %d\n", name, info.kind, info.major, info.minor,
           static_cast<int>(object.getAPILanguage()));
}

void call_build(IPluginV3OneBuild& build) {
    DynamicPluginTensorDesc in = {}, out = {};
    in.max.d[7] = 1000, out.opt.d[7] = 2000;
    show("configurePlugin", build.configurePlugin(&in, 1, &out, 2));
    DataType type = DataType::kFLOAT, given = DataType::kINT64;
    show("getOutputDataTypes", build.getOutputDataTypes(&type, 3, &given, 4) + static_cast<int>(type));
    DimsExprs shape = {}, result = {};
    shape.nbDims = 8;
    shape.d[7] = reinterpret_cast<const IDimensionExpr*>(probe_address(3));
    char builder = 0;
    show("getOutputShapes", build.getOutputShapes(&shape, 1, nullptr, 2, &result, 3,
                                                  *reinterpret_cast<IExprBuilder*>(&builder)));
    show("its result", 10 * result.nbDims + number_of(result.d[7]));
    show("supportsFormatCombination", build.supportsFormatCombination(4, &in, 1, 1));
    show("getNbOutputs", build.getNbOutputs());
    show("getWorkspaceSize", static_cast<long long>(build.getWorkspaceSize(&in, 1, &out, 2)));
    int32_t tactic = 0;
    show("getValidTactics", build.getValidTactics(&tactic, 1) + 10 * tactic);
    show("getNbTactics", build.getNbTactics());
    printf("getTimingCacheID %s\n", build.getTimingCacheID());
    show("getFormatCombinationLimit", build.getFormatCombinationLimit());
    printf("getMetadataString %s\n", build.getMetadataString());
}

void call_runtime(IPluginV3OneRuntime& runtime) {
    show("setTactic", runtime.setTactic(3));
    PluginTensorDesc in = {}, out = {};
    in.scale = 100, out.scale = 200, in.dims.nbDims = 10, out.type = DataType::kBF16;
    show("onShapeChange", runtime.onShapeChange(&in, 1, &out, 2));
    const void* inputs[] = {&in};
    void* outputs[] = {&in};
    show("enqueue", runtime.enqueue(&in, &out, inputs, outputs, nullptr, nullptr));
    show("attachToContext", number_of(runtime.attachToContext(nullptr)));
    const PluginFieldCollection* fields = runtime.getFieldsToSerialize();
    printf("getFieldsToSerialize %d %s %s %d %d\n", fields->nbFields, fields->fields->name,
           static_cast<const char*>(fields->fields->data), static_cast<int>(fields->fields->type),
           fields->fields->length);
}

void call_creator(IPluginCreatorV3One& creator) {
    PluginFieldCollection fields = {7, nullptr};
    show("createPlugin", number_of(creator.createPlugin("name", &fields, TensorRTPhase::kRUNTIME)));
    show("getFieldNames", creator.getFieldNames()->nbFields);
    printf("creator %s %s %s\n", creator.getPluginName(), creator.getPluginVersion(),
           creator.getPluginNamespace());
}

}  // namespace

#define LAYOUT(type, member) \
    printf("%s.%s at %zu, all %zu\n", #type, #member, offsetof(type, member), sizeof(type))

int main() {
    auto* core = static_cast<IPluginV3OneCore*>(probe_make(0));
    auto* build = static_cast<IPluginV3OneBuild*>(probe_make(1));
    auto* runtime = static_cast<IPluginV3OneRuntime*>(probe_make(2));
    auto* plugin = static_cast<IPluginV3*>(probe_make(3));
    auto* creator = static_cast<IPluginCreatorV3One*>(probe_make(4));
    about("core", *core);
    about("build", *build);
    about("runtime", *runtime);
    about("plugin", *plugin);
    about("creator", *creator);
    printf("core %s %s %s\n", core->getPluginName(), core->getPluginVersion(), core->getPluginNamespace());
    call_build(*build);
    call_runtime(*runtime);
    for (PluginCapabilityType type :
         {PluginCapabilityType::kCORE, PluginCapabilityType::kBUILD, PluginCapabilityType::kRUNTIME}) {
        show("getCapabilityInterface", number_of(plugin->getCapabilityInterface(type)));
    }
    show("clone", number_of(plugin->clone()));
    call_creator(*creator);
    delete plugin;
    LAYOUT(Dims, d);
    LAYOUT(DimsExprs, d);
    LAYOUT(InterfaceInfo, minor);
    LAYOUT(PluginField, length);
    LAYOUT(PluginFieldCollection, fields);
    LAYOUT(PluginTensorDesc, scale);
    LAYOUT(DynamicPluginTensorDesc, opt);
    const int values[] = {int(DataType::kFLOAT),
                          int(DataType::kHALF),
                          int(DataType::kINT8),
                          int(DataType::kINT32),
                          int(DataType::kBOOL),
                          int(DataType::kUINT8),
                          int(DataType::kFP8),
                          int(DataType::kBF16),
                          int(DataType::kINT64),
                          int(TensorFormat::kLINEAR),
                          int(PluginFieldType::kFLOAT16),
                          int(PluginFieldType::kFLOAT32),
                          int(PluginFieldType::kFLOAT64),
                          int(PluginFieldType::kINT8),
                          int(PluginFieldType::kINT16),
                          int(PluginFieldType::kINT32),
                          int(PluginFieldType::kCHAR),
                          int(PluginFieldType::kDIMS),
                          int(PluginFieldType::kUNKNOWN),
                          int(PluginFieldType::kBF16),
                          int(PluginFieldType::kINT64),
                          int(TensorRTPhase::kBUILD),
                          int(TensorRTPhase::kRUNTIME)};
    for (int value : values) {
        show("value", value);
    }
}
