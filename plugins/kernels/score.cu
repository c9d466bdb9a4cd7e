// Chooses and launches the score kernel.
#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "score.cuh"

namespace fasa {
namespace {

int multiprocessors() {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

template <typename T>
fasa_status launch_score_of(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    const int sets = token_sets(p);
    const int n_tip = p.labels.n_tip;
    // Two blocks a multiprocessor hold enough loads in flight; more only make the queries' quantisation
    // repeat.
    const int blocks = 2 * multiprocessors();
    if (p.labels.kind == FASA_LABELS_PREFIX) {
        const dim3 grid(std::max(1, 3 * blocks / 2 / (p.num_seqs * sets)), sets, p.num_seqs);
        if (n_tip <= 8) {
            score_prefix<T, 2><<<grid, kScoreThreads, 0, stream>>>(p, scores, sets);
        } else if (n_tip <= 16) {
            score_prefix<T, 4><<<grid, kScoreThreads, 0, stream>>>(p, scores, sets);
        } else if (n_tip <= 32) {
            score_prefix<T, 8><<<grid, kScoreThreads, 0, stream>>>(p, scores, sets);
        } else {
            score_prefix<T, 16><<<grid, kScoreThreads, 0, stream>>>(p, scores, sets);
        }
        return launched();
    }
    const dim3 grid(std::max(1, (blocks + p.num_seqs - 1) / p.num_seqs), p.num_seqs);
    const auto with = [&](auto words, auto int4) {
        if constexpr ((int4() ? 8 : 4) * words() <= kCodes)
            score_labels<T, words(), int4()><<<grid, kScoreThreads, 0, stream>>>(p, scores, sets);
    };
    const auto words = [&](auto int4) {
        switch (n_tip / (int4() ? 4 : 2)) {
            case 2:
                with(std::integral_constant<int, 2>{}, int4);
                return true;
            case 4:
                with(std::integral_constant<int, 4>{}, int4);
                return true;
            case 6:
                with(std::integral_constant<int, 6>{}, int4);
                return true;
            case 8:
                with(std::integral_constant<int, 8>{}, int4);
                return true;
            case 12:
                with(std::integral_constant<int, 12>{}, int4);
                return true;
            case 16:
                with(std::integral_constant<int, 16>{}, int4);
                return true;
            case 24:
                with(std::integral_constant<int, 24>{}, int4);
                return true;
            case 32:
                with(std::integral_constant<int, 32>{}, int4);
                return true;
            default:
                return false;
        }
    };
    const bool known = p.labels.kind == FASA_LABELS_INT4 ? words(std::true_type{}) : words(std::false_type{});
    return known ? launched() : FASA_UNSUPPORTED;
}

}  // namespace

fasa_status launch_score(const fasa_decode_params& p, const Scores& scores, cudaStream_t stream) {
    return p.pool.dtype == FASA_FLOAT16 ? launch_score_of<__half>(p, scores, stream)
                                        : launch_score_of<__nv_bfloat16>(p, scores, stream);
}

}  // namespace fasa
