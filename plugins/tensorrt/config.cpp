#include "config.h"

#include <cmath>
#include <cstring>

namespace fasa {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

struct IntField {
    const char* name;
    int32_t LayerConfig::* member;
    int64_t least, most;
    bool required;
};
struct FloatField {
    const char* name;
    float LayerConfig::* member;
    bool required;
};

constexpr int64_t kMost = 1 << 30;
constexpr IntField kInts[] = {
    {"layer_index", &LayerConfig::layer_index, 0, 65535, true},
    {"num_q_heads", &LayerConfig::num_q_heads, 1, 512, true},
    {"num_kv_heads", &LayerConfig::num_kv_heads, 1, 32, true},
    {"head_dim", &LayerConfig::head_dim, 64, 256, true},
    {"tokens_per_block", &LayerConfig::tokens_per_block, 8, 128, true},
    {"num_layers", &LayerConfig::num_layers, 1, 65535, true},
    {"label_kind", &LayerConfig::label_kind, FASA_LABELS_PREFIX, FASA_LABELS_FP8, false},
    {"n_tip", &LayerConfig::n_tip, 0, 64, true},
    {"budget", &LayerConfig::budget, 0, kMost, true},
    {"sink", &LayerConfig::sink, 0, kMost, true},
    {"recent", &LayerConfig::recent, 0, kMost, true},
    {"reduction", &LayerConfig::reduction, FASA_REDUCE_SUM, FASA_REDUCE_SAMPLED_SOFTMAX, false},
    {"window", &LayerConfig::window, 0, kMost, false},
    {"dense_below", &LayerConfig::dense_below, FASA_DENSE_AUTO, kMost, false},
    {"has_qk_norm", &LayerConfig::has_qk_norm, 0, 1, false},
    {"max_num_tokens", &LayerConfig::max_num_tokens, 1, kMost, true},
    {"max_batch_size", &LayerConfig::max_batch_size, 1, 65535, true},
    {"max_seq_len", &LayerConfig::max_seq_len, 1, kMost, true},
};
constexpr FloatField kFloats[] = {
    {"scale", &LayerConfig::scale, true},
    {"softcap", &LayerConfig::softcap, false},
    {"norm_eps", &LayerConfig::norm_eps, false},
};

template <typename Field, size_t N>
const Field* find(const Field (&fields)[N], const char* name) {
    for (const Field& field : fields) {
        if (std::strcmp(field.name, name) == 0) {
            return &field;
        }
    }
    return nullptr;
}

std::string read(const PluginField& given, const IntField& field, LayerConfig& config) {
    int64_t value = 0;
    if (given.type == PluginFieldType::kINT32) {
        value = *static_cast<const int32_t*>(given.data);
    } else if (given.type == PluginFieldType::kINT64) {
        value = *static_cast<const int64_t*>(given.data);
    } else {
        return std::string(field.name) + " must be an integer";
    }
    if (value < field.least || value > field.most) {
        return std::string(field.name) + " is " + std::to_string(value) + ", not in " +
               std::to_string(field.least) + ".." + std::to_string(field.most);
    }
    config.*field.member = static_cast<int32_t>(value);
    return {};
}

std::string read(const PluginField& given, const FloatField& field, LayerConfig& config) {
    if (given.type != PluginFieldType::kFLOAT32) {
        return std::string(field.name) + " must be a float32";
    }
    const float value = *static_cast<const float*>(given.data);
    if (!std::isfinite(value) || value < 0.f) {
        return std::string(field.name) + " must be a finite number that is not negative";
    }
    config.*field.member = value;
    return {};
}

template <typename Field, size_t N>
std::string missing(const Field (&fields)[N], const nvinfer1::PluginFieldCollection& given) {
    for (const Field& field : fields) {
        bool found = !field.required;
        for (int32_t i = 0; i < given.nbFields && !found; ++i) {
            found = std::strcmp(given.fields[i].name, field.name) == 0;
        }
        if (!found) {
            return std::string(field.name) + " is missing";
        }
    }
    return {};
}

// What fasa.h asks of values together, in words.
std::string check(const LayerConfig& c) {
    if (!has_head_dim(c.head_dim)) {
        return "this library has no kernels for head_dim " + std::to_string(c.head_dim);
    }
    if (c.num_q_heads % c.num_kv_heads != 0 || c.num_q_heads / c.num_kv_heads > 16) {
        return "num_q_heads must be 1 to 16 times num_kv_heads";
    }
    if ((c.tokens_per_block & (c.tokens_per_block - 1)) != 0) {
        return "tokens_per_block must be a power of two";
    }
    if (c.scale == 0.f) {
        return "scale must not be 0";
    }
    if (int64_t(c.max_num_tokens) * c.num_q_heads * c.head_dim >= int64_t(1) << 32) {
        return "max_num_tokens * num_q_heads * head_dim must stay below 2^32";
    }
    if (c.n_tip == 0) {
        return has_label_head(c) ? "a dense layer has no labels: label_kind 0" : "";
    }
    if ((c.n_tip % 8 != 0 || (c.n_tip > 32 && c.n_tip % 16 != 0)) || 2 * c.n_tip > c.head_dim) {
        return "n_tip must be 8, 16, 24, 32, 48 or 64, and at most head_dim / 2";
    }
    if (c.window != 0) {
        return "a layer with a window must be dense: n_tip 0";
    }
    if (c.num_q_heads > 128) {
        return "a sparse layer has at most 128 query heads";
    }
    if (has_label_head(c) && c.num_kv_heads * label_bytes(c) > 2 * c.head_dim) {
        return "the labels of num_kv_heads heads must fit into a row of the pool: " +
               std::to_string(c.num_kv_heads * label_bytes(c)) + " bytes are more than " +
               std::to_string(2 * c.head_dim);
    }
    if (c.budget < 16 || c.budget > 4096 || c.recent < 1 || int64_t(c.sink) + c.recent > c.budget) {
        return "budget must be 16 to 4096, recent at least 1, and sink + recent within the budget";
    }
    return {};
}

}  // namespace

std::string parse(const nvinfer1::PluginFieldCollection& given, LayerConfig& config) {
    for (int32_t i = 0; i < given.nbFields; ++i) {
        const PluginField& field = given.fields[i];
        const IntField* as_int = find(kInts, field.name);
        const FloatField* as_float = find(kFloats, field.name);
        if (as_int == nullptr && as_float == nullptr) {
            return std::string("unknown attribute ") + field.name;
        }
        if (field.data == nullptr || field.length != 1) {
            return std::string(field.name) + " must be a single number";
        }
        std::string wrong = as_int != nullptr ? read(field, *as_int, config) : read(field, *as_float, config);
        if (!wrong.empty()) {
            return wrong;
        }
    }
    std::string wrong = missing(kInts, given);
    wrong = wrong.empty() ? missing(kFloats, given) : wrong;
    return wrong.empty() ? check(config) : wrong;
}

std::vector<PluginField> fields_of(const LayerConfig& config) {
    std::vector<PluginField> fields;
    for (const IntField& field : kInts) {
        fields.emplace_back(field.name, &(config.*field.member), PluginFieldType::kINT32, 1);
    }
    for (const FloatField& field : kFloats) {
        fields.emplace_back(field.name, &(config.*field.member), PluginFieldType::kFLOAT32, 1);
    }
    return fields;
}

}  // namespace fasa
