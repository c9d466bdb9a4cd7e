// Chooses and launches the score kernels.
#include <algorithm>

#include "launch.cuh"
#include "score_labels.cuh"
#include "score_prefix.cuh"

namespace fasa {

// Two blocks of threads a multiprocessor run at a time, or three. Rows are cut into as many blocks as fill a
// whole number of such waves best; each wave costs its blocks' start.
int score_blocks(const fasa_decode_params& p) {
    const bool prefix = p.labels.kind == FASA_LABELS_PREFIX;
    const int rows = prefix ? p.num_seqs * p.pool.num_kv_heads : p.num_seqs;
    const int wave =
        multiprocessors() *
        (prefix || p.reduction == FASA_REDUCE_SUM ? 2 : head_blocks(p.num_q_heads / p.pool.num_kv_heads));
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

// All of them, or for a sample of tiles as many as have something to do: for each block the score pass reads
// a part.
int normalise_blocks(const fasa_decode_params& p) {
    const int blocks = score_blocks(p);
    if (p.reduction != FASA_REDUCE_SAMPLED_SOFTMAX) {
        return blocks;
    }
    const int each = kScoreWarps * (p.labels.kind == FASA_LABELS_PREFIX ? 4 : 1);
    return std::clamp(VisitedTiles(p.max_length, true).turns / each, 1, blocks);
}

namespace {

template <class Format>
fasa_status launch_format(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    return launch_scoring(score_labels<Format>, dim3(score_blocks(p), p.num_seqs), kScoreThreads,
                          score_labels_shared<Format>(p.pool.num_kv_heads), stream, p, scores);
}

template <fasa_label_kind KIND>
fasa_status launch_labels(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    return with_n_tip(p.labels.n_tip, [&](auto n_tip) {  // words a label: n_tip / 4 of 4 bits, n_tip / 2 of 8
        return launch_format<LabelFormat<KIND, n_tip() / (KIND == FASA_LABELS_INT4 ? 4 : 2)>>(p, scores,
                                                                                              stream);
    });
}

template <typename T, int CHUNKS, int COLUMNS, Pass PASS>
fasa_status launch_prefix_pass(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    const int blocks = PASS == Pass::kNormalise ? scores.parts : score_blocks(p);
    const dim3 grid(blocks, p.pool.num_kv_heads, p.num_seqs);
    return launch_scoring(score_prefix<T, CHUNKS, COLUMNS, PASS>, grid, kScoreThreads, 0, stream, p, scores);
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
    const bool wide = p.num_q_heads / p.pool.num_kv_heads > kTileColumns;
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
    if (p.labels.kind != FASA_LABELS_PREFIX && p.reduction != FASA_REDUCE_SUM) {
        return launch_score_heads(p, scores, stream);
    }
    switch (p.labels.kind) {
        case FASA_LABELS_INT4:
            return launch_labels<FASA_LABELS_INT4>(p, scores, stream);
        case FASA_LABELS_INT8:
            return launch_labels<FASA_LABELS_INT8>(p, scores, stream);
        case FASA_LABELS_FP8:
            return launch_labels<FASA_LABELS_FP8>(p, scores, stream);
        default:
            return p.pool.dtype == FASA_FLOAT16 ? launch_prefix<__half>(p, scores, stream)
                                                : launch_prefix<__nv_bfloat16>(p, scores, stream);
    }
}

}  // namespace fasa
