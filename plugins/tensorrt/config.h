// The attributes of a FasaAttention node, from and to plugin fields.
#pragma once

#include <string>
#include <vector>

#include "step.h"
#include "tensorrt.h"

namespace fasa {

// Reads all fields. Returns what is wrong with them, empty if nothing is: unknown, missing, of another type,
// out of range, or not to be had together.
std::string parse(const nvinfer1::PluginFieldCollection& fields, LayerConfig& config);

// Fields that `parse` makes the same config of; they point into `config`.
std::vector<nvinfer1::PluginField> fields_of(const LayerConfig& config);

}  // namespace fasa
