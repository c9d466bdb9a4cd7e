// Chooses and launches the score kernels.
#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "score_labels.cuh"
#include "score_prefix.cuh"

namespace fasa {

int multiprocessors() {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// Two blocks of threads a multiprocessor run at a time. Rows are cut into as many blocks as fill a whole
// number of such waves best; each wave costs its blocks' start.
int score_blocks(const fasa_decode_params& p) {
    const int rows = p.labels.kind == FASA_LABELS_PREFIX ? p.num_seqs * p.pool.num_kv_heads : p.num_seqs;
    const int wave = 2 * multiprocessors();
    int best = 1;
    double best_share = 0;
    for (int waves = 1; waves <= 8; ++waves) {
        const int blocks = waves * wave / rows;
        const double share = blocks * rows / (waves * wave * (1 + 0.04 * waves));
        if (share > best_share) {
            best_share = share, best = blocks;
        }
    }
    return best;
}

namespace {

template <class Format, Pass PASS>
fasa_status launch_labels(const fasa_decode_params& p, const Scores& scores, int sets, int heads, int summed,
                          cudaStream_t stream) {
    const auto kernel = score_labels<Format, PASS>;
    const size_t bytes = score_labels_shared<Format>(std::min(sets, kSetsAtOnce) * heads);
    if (bytes > 48 << 10 &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))) {
        return FASA_LAUNCH_FAILED;
    }
    return launch_overlapped(kernel,
                             dim3(score_blocks(p), p.num_seqs, (sets + kSetsAtOnce - 1) / kSetsAtOnce),
                             kScoreThreads, bytes, stream, p, scores, sets, heads, summed);
}

template <class Format>
fasa_status launch_passes(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    const int q_heads = p.num_q_heads, kv_heads = p.pool.num_kv_heads, group = q_heads / kv_heads;
    switch (p.reduction) {
        case FASA_REDUCE_SUM:
            return launch_labels<Format, Pass::kKeys>(p, scores, kv_heads, 1, group, stream);
        case FASA_REDUCE_PER_HEAD:
            return launch_labels<Format, Pass::kKeys>(p, scores, q_heads, 1, 1, stream);
        default: {
            const fasa_status status =
                launch_labels<Format, Pass::kNormalise>(p, scores, q_heads, 1, 1, stream);
            return status != FASA_OK
                       ? status
                       : launch_labels<Format, Pass::kSoftmax>(p, scores, kv_heads, group, 1, stream);
        }
    }
}

template <fasa_label_kind KIND>
fasa_status launch_words(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    switch (p.labels.n_tip) {  // words a label: n_tip / 4 of 4 bits, n_tip / 2 of 8
#define FASA_N_TIP(n) \
    case n:           \
        return launch_passes<LabelFormat<KIND, KIND == FASA_LABELS_INT4 ? n / 4 : n / 2>>(p, scores, stream);
        FASA_N_TIP(8)
        FASA_N_TIP(16)
        FASA_N_TIP(24)
        FASA_N_TIP(32)
        FASA_N_TIP(48)
        FASA_N_TIP(64)
#undef FASA_N_TIP
        default:
            return FASA_UNSUPPORTED;
    }
}

template <typename T, int CHUNKS, int COLUMNS, Pass PASS>
fasa_status launch_prefix_pass(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    const dim3 grid(score_blocks(p), p.pool.num_kv_heads, p.num_seqs);
    return launch_overlapped(score_prefix<T, CHUNKS, COLUMNS, PASS>, grid, kScoreThreads, 0, stream, p,
                             scores);
}

template <typename T, int CHUNKS, int COLUMNS>
fasa_status launch_prefix_passes(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    if (!by_softmax(p.reduction)) {
        return launch_prefix_pass<T, CHUNKS, COLUMNS, Pass::kKeys>(p, scores, stream);
    }
    const fasa_status status = launch_prefix_pass<T, CHUNKS, COLUMNS, Pass::kNormalise>(p, scores, stream);
    return status != FASA_OK ? status
                             : launch_prefix_pass<T, CHUNKS, COLUMNS, Pass::kSoftmax>(p, scores, stream);
}

template <typename T>
fasa_status launch_prefix(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    const bool wide = p.num_q_heads / p.pool.num_kv_heads > 8;
    switch ((p.labels.n_tip + 15) / 16) {
        case 1:
            return wide ? launch_prefix_passes<T, 1, 2>(p, scores, stream)
                        : launch_prefix_passes<T, 1, 1>(p, scores, stream);
        case 2:
            return wide ? launch_prefix_passes<T, 2, 2>(p, scores, stream)
                        : launch_prefix_passes<T, 2, 1>(p, scores, stream);
        case 3:
            return wide ? launch_prefix_passes<T, 3, 2>(p, scores, stream)
                        : launch_prefix_passes<T, 3, 1>(p, scores, stream);
        default:
            return wide ? launch_prefix_passes<T, 4, 2>(p, scores, stream)
                        : launch_prefix_passes<T, 4, 1>(p, scores, stream);
    }
}

}  // namespace

fasa_status launch_score(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    switch (p.labels.kind) {
        case FASA_LABELS_INT4:
            return launch_words<FASA_LABELS_INT4>(p, scores, stream);
        case FASA_LABELS_INT8:
            return launch_words<FASA_LABELS_INT8>(p, scores, stream);
        case FASA_LABELS_FP8:
            return launch_words<FASA_LABELS_FP8>(p, scores, stream);
        default:
            return p.pool.dtype == FASA_FLOAT16 ? launch_prefix<__half>(p, scores, stream)
                                                : launch_prefix<__nv_bfloat16>(p, scores, stream);
    }
}

}  // namespace fasa
