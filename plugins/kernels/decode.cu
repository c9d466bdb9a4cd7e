// fasa_decode: checks its parameters, lays out the workspace, and sends each sequence to dense or to sparse
// attention.
#include <algorithm>
#include <iterator>

#include "dense.cuh"
#include "head_dims.cuh"
#include "launch.cuh"
#include "query.cuh"

namespace fasa {
namespace {

// Where FASA_DENSE_AUTO draws the line: below so many cached bytes of keys and values in a step, or so few
// budgets of context, dense attention is done before selection is (measured; see plugins/README.md).
constexpr int64_t kCrossoverBytes = 15 << 20;
constexpr int kCrossoverBudgets = 3;

bool valid(const fasa_labels& labels, int head_dim) {
    constexpr int kKnown[] = {8, 16, 24, 32, 48, 64};
    const bool known = std::find(std::begin(kKnown), std::end(kKnown), labels.n_tip) != std::end(kKnown);
    if (!known || 2 * labels.n_tip > head_dim || labels.kind < FASA_LABELS_PREFIX ||
        labels.kind > FASA_LABELS_FP8) {
        return false;
    }
    const int64_t bytes = labels.kind == FASA_LABELS_INT4 ? labels.n_tip : 2 * labels.n_tip;
    const int64_t misaligned = reinterpret_cast<intptr_t>(labels.labels) | labels.label_block_stride |
                               labels.label_token_stride | labels.label_head_stride |
                               labels.secondary_distance;
    return labels.kind == FASA_LABELS_PREFIX || (labels.labels != nullptr && labels.offset_divisor >= 1 &&
                                                 misaligned % (bytes % 16 ? 8 : 16) == 0);
}

bool valid(const fasa_decode_params& p) {
    return dense_valid(p) && valid(p.labels, p.pool.head_dim) && p.num_q_heads <= 128 && p.max_length >= 1 &&
           p.budget >= 16 && p.budget <= 4096 && p.sink >= 0 && p.recent >= 1 &&
           p.sink + p.recent <= p.budget && p.window == 0;
}

// The workspace, in order. Each part is a multiple of 256 bytes.
struct Workspace {
    Scores scores;
    void* dense;
    size_t bytes;

    Workspace(const fasa_decode_params& p, void* base) {
        const size_t rows = static_cast<size_t>(p.num_seqs) * token_sets(p);
        const size_t slots = static_cast<size_t>(p.num_seqs) * p.num_q_heads;
        const auto take = [&](auto*& part, size_t count) {
            part =
                reinterpret_cast<std::remove_reference_t<decltype(part)>>(static_cast<char*>(base) + bytes);
            bytes += (count * sizeof(*part) + 255) / 256 * 256;
        };
        bytes = 0;
        scores.octets = (p.max_length + 63) / 64 * 8;
        take(scores.keys, rows * scores.octets * kOctet);
        take(scores.maxima, rows * scores.octets);
        take(scores.queries, slots * kLabelDims);
        take(scores.factors, slots);
        take(scores.normaliser, slots);
        scores.parts = by_softmax(p.reduction) ? normalise_blocks(p) : 0;
        take(scores.partials, slots * scores.parts);
        dense = static_cast<char*>(base) + bytes;
        bytes += dense_workspace(p, p.max_length);
    }
};

}  // namespace
}  // namespace fasa

extern "C" int32_t fasa_dense_below(const fasa_decode_params* params) {
    using namespace fasa;
    if (params == nullptr || params->num_seqs < 1 || params->pool.num_kv_heads < 1 ||
        params->pool.head_dim < 1) {
        return 0;
    }
    const int64_t token = 4 * static_cast<int64_t>(params->pool.head_dim) * params->pool.num_kv_heads;
    const int64_t line = kCrossoverBytes / (token * params->num_seqs);
    return static_cast<int32_t>(std::max<int64_t>(line, kCrossoverBudgets * params->budget));
}

extern "C" size_t fasa_decode_workspace(const fasa_decode_params* params) {
    return params == nullptr || !fasa::valid(*params) ? 0 : fasa::Workspace(*params, nullptr).bytes;
}

extern "C" fasa_status fasa_decode(const fasa_decode_params* params, void* stream) {
    using namespace fasa;
    if (params == nullptr || !valid(*params)) {
        return FASA_BAD_ARGUMENT;
    }
    const fasa_decode_params p = completed(*params);
    const Workspace workspace(p, p.workspace);
    if (p.workspace == nullptr || p.workspace_bytes < workspace.bytes) {
        return FASA_SMALL_WORKSPACE;
    }
    const auto on = static_cast<cudaStream_t>(stream);
    const int dense_below = p.dense_below == FASA_DENSE_AUTO ? fasa_dense_below(&p) : p.dense_below;
    if (p.max_length <= std::max(p.budget, dense_below)) {
        return launch_dense_decode(p, workspace.dense, on);
    }
    const fasa_status status = launch_score(p, workspace.scores, on);
    return status != FASA_OK ? status : with_head_dim(p.pool.head_dim, [&](auto head_dim) {
        return launch_attend<head_dim()>(p, workspace.scores, dense_partials(p, p.budget, workspace.dense),
                                         on);
    });
}

extern "C" const char* fasa_status_text(fasa_status status) {
    switch (status) {
        case FASA_OK:
            return "done";
        case FASA_BAD_ARGUMENT:
            return "a parameter is out of its range, see fasa.h";
        case FASA_UNSUPPORTED:
            return "the library was not built for this head_dim, or no kernel exists for this combination";
        case FASA_SMALL_WORKSPACE:
            return "the workspace is smaller than its *_workspace() function asks for";
        case FASA_LAUNCH_FAILED:
            return "CUDA refused the launch; see cudaGetLastError()";
    }
    return "unknown status";
}
