// FasaAttention, one attention layer over TensorRT-LLM's paged pool, as a TensorRT plugin. Inputs in order:
//   q, k, v [T, heads * head_dim], inv_freq, rope_scale [kv_heads, head_dim / 2], then TensorRT-LLM's
//   bindings sequence_length, context_lengths, host_context_lengths, host_request_types,
//   host_past_key_value_lengths, kv_cache_block_offsets, host_kv_cache_pool_pointers,
//   host_kv_cache_pool_mapping, and with has_qk_norm q_norm [q_heads, head_dim], k_norm [kv_heads, head_dim].
// Output: [T, q_heads * head_dim]. The pool is written in place.
#pragma once

#include <vector>

#include "step.h"
#include "tensorrt.h"

namespace fasa {

constexpr char kPluginName[] = "FasaAttention";
constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "ai.fasa";

class FasaAttention : public nvinfer1::IPluginV3,
                      public nvinfer1::IPluginV3OneCore,
                      public nvinfer1::IPluginV3OneBuild,
                      public nvinfer1::IPluginV3OneRuntime {
  public:
    FasaAttention(const LayerConfig& config, nvinfer1::TensorRTPhase phase);
    FasaAttention(const FasaAttention&) = delete;
    FasaAttention& operator=(const FasaAttention&) = delete;
    ~FasaAttention() override = default;

    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                            nvinfer1::DynamicPluginTensorDesc const* out,
                            int32_t nbOutputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
                               nvinfer1::DataType const* inputTypes,
                               int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
                            nvinfer1::DimsExprs const* shapeInputs, int32_t nbShapeInputs,
                            nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                            nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut,
                                   int32_t nbInputs, int32_t nbOutputs) noexcept override;
    int32_t getNbOutputs() const noexcept override { return 1; }
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
                            nvinfer1::DynamicPluginTensorDesc const* outputs,
                            int32_t nbOutputs) const noexcept override;

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
                          nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

  private:
    LayerConfig config_;
    nvinfer1::TensorRTPhase phase_;
    size_t workspace_bytes_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_;
};

// Writes a line to stderr, where TensorRT-LLM's and Triton's logs go too. TensorRT's logger is not used: its
// virtual methods are not in the same place in TensorRT 10 and 11, and one library serves both.
void log_error(const char* what);

}  // namespace fasa
