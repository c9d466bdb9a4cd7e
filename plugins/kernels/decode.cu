// fasa_decode: checks its parameters, lays out the workspace and launches the score pass, then selection and
// attention.
#include "launch.cuh"

namespace fasa {
namespace {

int row_octets(const fasa_decode_params& p) {
    return (p.max_length + 63) / 64 * 8;
}

bool valid(const fasa_decode_params& p) {
    const fasa_pool& pool = p.pool;
    const int tokens = pool.tokens_per_block;
    const bool pool_fits = tokens >= 8 && tokens <= 128 && (tokens & (tokens - 1)) == 0 &&
                           pool.num_kv_heads >= 1 && pool.num_kv_heads <= 32 && pool.max_blocks >= 1;
    const bool heads_fit = pool_fits && p.num_q_heads >= 1 && p.num_q_heads % pool.num_kv_heads == 0 &&
                           p.num_q_heads / pool.num_kv_heads <= 16 && token_sets(p) <= 128;
    return heads_fit && p.num_seqs >= 1 && p.num_seqs <= 65535 && p.max_length >= 1 && p.budget >= 16 &&
           p.budget <= 4096 && p.sink >= 0 && p.recent >= 1 && p.sink + p.recent <= p.budget &&
           p.labels.n_tip >= 8 && p.labels.n_tip % 8 == 0 && 2 * p.labels.n_tip <= pool.head_dim;
}

fasa_status launch(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    const fasa_status scored = launch_score(p, scores, stream);
    if (scored != FASA_OK) {
        return scored;
    }
    switch (p.pool.head_dim) {
        case 64:
            return launch_attend<64>(p, scores, stream);
        case 96:
            return launch_attend<96>(p, scores, stream);
        case 128:
            return launch_attend<128>(p, scores, stream);
        case 256:
            return launch_attend<256>(p, scores, stream);
        default:
            return FASA_UNSUPPORTED;
    }
}

}  // namespace
}  // namespace fasa

extern "C" size_t fasa_decode_workspace(const fasa_decode_params* params) {
    using namespace fasa;
    if (params == nullptr || !valid(*params)) {
        return 0;
    }
    const size_t rows = static_cast<size_t>(params->num_seqs) * token_sets(*params);
    return rows * (row_octets(*params) * (kOctet + 1) * sizeof(uint16_t) + kCodes + sizeof(float));
}

extern "C" fasa_status fasa_decode(const fasa_decode_params* params, void* stream) {
    using namespace fasa;
    if (params == nullptr || !valid(*params)) {
        return FASA_BAD_ARGUMENT;
    }
    if (params->workspace == nullptr || params->workspace_bytes < fasa_decode_workspace(params)) {
        return FASA_SMALL_WORKSPACE;
    }
    const size_t rows = static_cast<size_t>(params->num_seqs) * token_sets(*params);
    Scores scores;
    scores.octets = row_octets(*params);
    scores.keys = static_cast<uint16_t*>(params->workspace);
    scores.maxima = scores.keys + rows * scores.octets * kOctet;
    scores.codes = reinterpret_cast<int8_t*>(scores.maxima + rows * scores.octets);
    scores.factors = reinterpret_cast<float*>(scores.codes + rows * kCodes);
    return launch(*params, scores, static_cast<cudaStream_t>(stream));
}

extern "C" const char* fasa_status_text(fasa_status status) {
    switch (status) {
        case FASA_OK:
            return "done";
        case FASA_BAD_ARGUMENT:
            return "a parameter is out of its range, see fasa.h";
        case FASA_UNSUPPORTED:
            return "no kernel for this combination of head_dim, n_tip and label kind";
        case FASA_SMALL_WORKSPACE:
            return "the workspace is smaller than fasa_decode_workspace() asks for";
        case FASA_LAUNCH_FAILED:
            return "CUDA refused the launch; see cudaGetLastError()";
    }
    return "unknown status";
}
