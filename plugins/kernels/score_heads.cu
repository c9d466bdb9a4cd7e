// Chooses and launches the score kernels for query heads that count by themselves.
#include "score_heads.cuh"

namespace fasa {
namespace {

template <class Tile, int COLUMNS, bool PAIRS, Pass PASS>
fasa_status launch_pass(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    const int kv_heads = p.pool.num_kv_heads;
    int parts = 1;
    while (parts * TileRing<Tile>::kHeads < kv_heads) {
        parts *= 2;
    }
    const int rows = parts <= kScoreWarps ? 1 : parts / kScoreWarps;  // of blocks
    const int blocks = PASS == Pass::kNormalise ? scores.parts : score_blocks(p);
    return launch_scoring(score_heads<Tile, COLUMNS, PASS, PAIRS>, dim3(blocks, p.num_seqs, rows),
                          kScoreThreads, score_heads_shared<Tile, COLUMNS>(kv_heads), stream, p, scores,
                          parts);
}

template <class Tile, int COLUMNS, bool PAIRS>
fasa_status launch_passes(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    if (!by_softmax(p.reduction)) {
        return launch_pass<Tile, COLUMNS, PAIRS, Pass::kKeys>(p, scores, stream);
    }
    const fasa_status status = launch_pass<Tile, COLUMNS, PAIRS, Pass::kNormalise>(p, scores, stream);
    return status != FASA_OK ? status : launch_pass<Tile, COLUMNS, PAIRS, Pass::kSoftmax>(p, scores, stream);
}

template <fasa_label_kind KIND>
fasa_status launch_labels(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    return with_n_tip(p.labels.n_tip, [&](auto n_tip) {
        using Tile = LabelTile<KIND, KIND == FASA_LABELS_INT4 ? n_tip() : 2 * n_tip()>;
        constexpr bool kPairs = TileRing<Tile>::kHeads > 1 && !Tile::kFloat;
        const int group = p.num_q_heads / p.pool.num_kv_heads;
        if (kPairs && group <= Slices<2, true>::kMembers) {
            return launch_passes<Tile, 1, kPairs>(p, scores, stream);
        }
        return group > kTileColumns ? launch_passes<Tile, 2, false>(p, scores, stream)
                                    : launch_passes<Tile, 1, false>(p, scores, stream);
    });
}

}  // namespace

fasa_status launch_score_heads(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    switch (p.labels.kind) {
        case FASA_LABELS_INT4:
            return launch_labels<FASA_LABELS_INT4>(p, scores, stream);
        case FASA_LABELS_INT8:
            return launch_labels<FASA_LABELS_INT8>(p, scores, stream);
        default:
            return launch_labels<FASA_LABELS_FP8>(p, scores, stream);
    }
}

}  // namespace fasa
