#include "fasa_attention.h"

#include <cstdio>
#include <new>
#include <string>

#include "config.h"

namespace fasa {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

enum Input {
    kQ,
    kK,
    kV,
    kInvFreq,
    kRopeScale,
    kSequenceLength,
    kContextLengths,
    kHostContextLengths,
    kHostRequestTypes,
    kHostPastLengths,  // not looked at: the device knows
    kBlockOffsets,
    kHostPoolPointers,
    kHostPoolMapping,
    kQNorm,
    kKNorm
};

int32_t num_inputs(const LayerConfig& config) {
    return config.has_qk_norm ? kKNorm + 1 : kQNorm;
}

bool supports(int32_t input, DataType type, DataType of_q) {
    if (input == kInvFreq || input == kRopeScale) {
        return type == DataType::kFLOAT;
    }
    if (input == kHostPoolPointers) {
        return type == DataType::kINT64;
    }
    if (input >= kSequenceLength && input <= kHostPoolMapping) {
        return type == DataType::kINT32;
    }
    return type == of_q && (type == DataType::kHALF || type == DataType::kBF16);
}

// A tensor's shape; -1 stands for any size, also in `dims`.
struct Shape {
    int32_t rank;
    int64_t sizes[4];

    bool fits(const Dims& dims) const {
        bool equal = dims.nbDims == rank;
        for (int32_t i = 0; i < rank && equal; ++i) {
            equal = sizes[i] < 0 || dims.d[i] < 0 || dims.d[i] == sizes[i];
        }
        return equal;
    }
};

// The first input whose shape is wrong; -1 for none.
template <typename DimsOf>
int32_t wrong_shape(const LayerConfig& c, int32_t nbInputs, DimsOf dims_of) {
    const int64_t kv = int64_t(c.num_kv_heads) * c.head_dim, half = c.head_dim / 2;
    const int64_t q = int64_t(c.num_q_heads) * c.head_dim;
    const int64_t tokens = dims_of(kQ).d[0], seqs = dims_of(kSequenceLength).d[0];
    const Shape shapes[] = {{2, {tokens, q}},
                            {2, {tokens, kv}},
                            {2, {tokens, kv}},
                            {2, {c.num_kv_heads, half}},
                            {2, {c.num_kv_heads, half}},
                            {1, {seqs}},
                            {1, {seqs}},
                            {1, {seqs}},
                            {1, {seqs}},
                            {1, {seqs}},
                            {4, {-1, seqs, 2, -1}},
                            {2, {dims_of(kBlockOffsets).d[0], 2}},
                            {2, {-1, 2}},
                            {2, {c.num_q_heads, c.head_dim}},
                            {2, {c.num_kv_heads, c.head_dim}}};
    for (int32_t i = 0; i < nbInputs; ++i) {
        if (!shapes[i].fits(dims_of(i))) {
            return i;
        }
    }
    return -1;
}

template <typename DimsOf>
int32_t check_shapes(const LayerConfig& config, int32_t nbInputs, int32_t nbOutputs, DimsOf dims_of) {
    if (nbInputs != num_inputs(config) || nbOutputs != 1) {
        log_error(("takes " + std::to_string(num_inputs(config)) + " inputs and 1 output, not " +
                   std::to_string(nbInputs) + " and " + std::to_string(nbOutputs))
                      .c_str());
        return 1;
    }
    const int32_t wrong = wrong_shape(config, nbInputs, dims_of);
    if (wrong >= 0) {
        log_error(
            ("input " + std::to_string(wrong) + " has a shape that does not fit the attributes").c_str());
        return 1;
    }
    return 0;
}

}  // namespace

void log_error(const char* what) {
    std::fprintf(stderr, "[fasa] %s: %s\n", kPluginName, what);
}

FasaAttention::FasaAttention(const LayerConfig& config, nvinfer1::TensorRTPhase phase)
    : config_(config), phase_(phase), workspace_bytes_(step_workspace(config)), fields_(fields_of(config_)) {
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
}

nvinfer1::IPluginCapability* FasaAttention::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* FasaAttention::clone() noexcept {
    return new (std::nothrow) FasaAttention(config_, phase_);
}

int32_t FasaAttention::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                                       nvinfer1::DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept {
    return check_shapes(config_, nbInputs, nbOutputs, [&](int32_t i) { return in[i].desc.dims; });
}

int32_t FasaAttention::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs,
                                          DataType const* inputTypes, int32_t nbInputs) const noexcept {
    if (nbInputs < 1 || nbOutputs != 1) {
        return 1;
    }
    outputTypes[0] = inputTypes[kQ];
    return 0;
}

int32_t FasaAttention::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
                                       nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                                       int32_t nbOutputs, nvinfer1::IExprBuilder&) noexcept {
    if (nbInputs < 1 || nbOutputs != 1) {
        return 1;
    }
    outputs[0] = inputs[kQ];
    return 0;
}

bool FasaAttention::supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut,
                                              int32_t nbInputs, int32_t nbOutputs) noexcept {
    if (nbInputs != num_inputs(config_) || nbOutputs != 1 || pos < 0 || pos > nbInputs) {
        return false;
    }
    const nvinfer1::PluginTensorDesc& desc = inOut[pos].desc;
    const int32_t input = pos == nbInputs ? kQ : pos;  // the output is as q
    return desc.format == nvinfer1::TensorFormat::kLINEAR && supports(input, desc.type, inOut[kQ].desc.type);
}

size_t FasaAttention::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const*, int32_t,
                                       nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept {
    return workspace_bytes_;
}

int32_t FasaAttention::onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
                                     nvinfer1::PluginTensorDesc const*, int32_t nbOutputs) noexcept {
    return check_shapes(config_, nbInputs, nbOutputs, [&](int32_t i) { return in[i].dims; });
}

int32_t FasaAttention::enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const*,
                               void const* const* inputs, void* const* outputs, void* workspace,
                               cudaStream_t stream) noexcept {
    if (phase_ == nvinfer1::TensorRTPhase::kBUILD) {
        return 0;  // a builder that times the layer hands over tensors without meaning, host ones among them
    }
    StepInputs in = {};
    in.dtype = inputDesc[kQ].type == DataType::kHALF ? FASA_FLOAT16 : FASA_BFLOAT16;
    in.num_tokens = static_cast<int32_t>(inputDesc[kQ].dims.d[0]);
    in.num_seqs = static_cast<int32_t>(inputDesc[kSequenceLength].dims.d[0]);
    in.num_pools = static_cast<int32_t>(inputDesc[kBlockOffsets].dims.d[0]);
    in.max_blocks = static_cast<int32_t>(inputDesc[kBlockOffsets].dims.d[3]);
    in.num_mapped_layers = static_cast<int32_t>(inputDesc[kHostPoolMapping].dims.d[0]);
    in.q = inputs[kQ];
    in.k = inputs[kK];
    in.v = inputs[kV];
    in.inv_freq = static_cast<const float*>(inputs[kInvFreq]);
    in.rope_scale = static_cast<const float*>(inputs[kRopeScale]);
    const auto ints = [&](Input input) { return static_cast<const int32_t*>(inputs[input]); };
    in.sequence_length = ints(kSequenceLength);
    in.context_lengths = ints(kContextLengths);
    in.host_context_lengths = ints(kHostContextLengths);
    in.host_request_types = ints(kHostRequestTypes);
    in.block_offsets = ints(kBlockOffsets);
    in.host_pool_pointers = static_cast<const int64_t*>(inputs[kHostPoolPointers]);
    in.host_pool_mapping = ints(kHostPoolMapping);
    in.q_norm = config_.has_qk_norm ? inputs[kQNorm] : nullptr;
    in.k_norm = config_.has_qk_norm ? inputs[kKNorm] : nullptr;
    const char* wrong = run_step(config_, in, outputs[0], workspace, workspace_bytes_, stream);
    if (wrong != nullptr) {
        log_error(("layer " + std::to_string(config_.layer_index) + ": " + wrong).c_str());
        return 1;
    }
    return 0;
}

nvinfer1::IPluginV3* FasaAttention::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    fasa_reserve_l2();  // for speed alone: a device that refuses works as well
    return clone();
}

nvinfer1::PluginFieldCollection const* FasaAttention::getFieldsToSerialize() noexcept {
    return &collection_;
}

}  // namespace fasa
