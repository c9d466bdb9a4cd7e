// The kernels' functions as plain loops over memory of the host, by the definitions in fasa.h: with them the
// plugin runs whole steps on a machine without a GPU. Only what those tests need: reduction SUM, no softcap.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "labels_on_cpu.h"

namespace {

double load(fasa_dtype dtype, const void* from, int64_t i) {
    return dtype == FASA_FLOAT16 ? __half2float(static_cast<const __half*>(from)[i])
                                 : __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
}

void store(fasa_dtype dtype, void* to, int64_t i, double x) {
    if (dtype == FASA_FLOAT16) {
        static_cast<__half*>(to)[i] = __float2half(static_cast<float>(x));
    } else {
        static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16(static_cast<float>(x));
    }
}

double rounded(fasa_dtype dtype, double x) {
    uint16_t place;
    store(dtype, &place, 0, x);
    return load(dtype, &place, 0);
}

void* cached(const fasa_pool& pool, int seq, int kind, int token, int head) {
    const int32_t offset =
        pool.offsets[(int64_t(seq) * 2 + kind) * pool.max_blocks + token / pool.tokens_per_block];
    const int64_t row = int64_t(pool.tokens_per_block) * head + token % pool.tokens_per_block;
    const int heads = pool.heads_per_block ? pool.heads_per_block : pool.num_kv_heads;
    const int64_t rows_of_block = int64_t(pool.tokens_per_block) * heads;
    char* base = static_cast<char*>(offset < 0 ? pool.secondary : pool.primary);
    return base + ((offset & 0x7fffffff) * rows_of_block + row) * pool.head_dim * 2;
}

Row read(fasa_dtype dtype, const void* from, int64_t first, int count) {
    Row row(count);
    for (int d = 0; d < count; ++d) {
        row[d] = load(dtype, from, first + d);
    }
    return row;
}

double dot(const Row& a, const Row& b, int dims) {
    return std::inner_product(a.begin(), a.begin() + dims, b.begin(), 0.0);
}

// Attention of one query head over some tokens of a sequence.
void attend(const fasa_pool& pool, int seq, int kv_head, const Row& q, const std::vector<int>& tokens,
            float scale, void* out, int64_t first) {
    double total = 0;
    Row sum(q.size());
    for (int token : tokens) {
        const Row k = read(pool.dtype, cached(pool, seq, 0, token, kv_head), 0, pool.head_dim);
        const Row v = read(pool.dtype, cached(pool, seq, 1, token, kv_head), 0, pool.head_dim);
        const double weight = std::exp(scale * dot(q, k, pool.head_dim));
        total += weight;
        for (size_t d = 0; d < v.size(); ++d) {
            sum[d] += weight * v[d];
        }
    }
    for (size_t d = 0; d < sum.size(); ++d) {
        store(pool.dtype, out, first + static_cast<int64_t>(d), sum[d] / total);
    }
}

std::vector<int> range(int first, int end) {
    std::vector<int> tokens(std::max(end - first, 0));
    std::iota(tokens.begin(), tokens.end(), first);
    return tokens;
}

std::vector<int> chosen(const fasa_decode_params& p, int seq, int kv_head, Row summed) {
    quantise_query(p.labels, summed);
    const int length = p.lengths[seq];
    std::vector<int> tokens = range(0, length);
    std::vector<double> scores(length);
    for (int token : tokens) {
        const bool forced = token < p.sink || token >= length - p.recent;
        const Row k = p.labels.kind == FASA_LABELS_PREFIX
                          ? read(p.pool.dtype, cached(p.pool, seq, 0, token, kv_head), 0, 2 * p.labels.n_tip)
                          : dequantised(p.labels, label(p.pool, p.labels, seq, token, kv_head));
        scores[token] = forced ? INFINITY : dot(summed, k, 2 * p.labels.n_tip);
    }
    std::stable_sort(tokens.begin(), tokens.end(), [&](int a, int b) { return scores[a] > scores[b]; });
    tokens.resize(p.budget);
    return tokens;
}

fasa_status decode(const fasa_decode_params& p, bool sparse) {
    const int group = p.num_q_heads / p.pool.num_kv_heads, dims = p.pool.head_dim;
    for (int seq = 0; seq < p.num_seqs; ++seq) {
        const int length = p.lengths[seq];
        if (length > p.max_length) {
            return FASA_BAD_ARGUMENT;
        }
        for (int kv_head = 0; kv_head < p.pool.num_kv_heads; ++kv_head) {
            Row summed(dims);
            std::vector<Row> q;
            const int64_t row = int64_t(seq) * p.num_q_heads + kv_head * group;
            for (int g = 0; g < group; ++g) {
                q.push_back(read(p.pool.dtype, p.q, (row + g) * dims, dims));
                std::transform(summed.begin(), summed.end(), q.back().begin(), summed.begin(),
                               [](double a, double b) { return static_cast<float>(a + b); });
            }
            const int first = !sparse && p.window > 0 ? std::max(length - p.window, 0) : 0;
            const auto tokens =
                sparse && length > p.budget ? chosen(p, seq, kv_head, summed) : range(first, length);
            for (int g = 0; g < group; ++g) {
                attend(p.pool, seq, kv_head, q[g], tokens, p.scale, p.out, (row + g) * dims);
            }
        }
    }
    return FASA_OK;
}

// Normalises and rotates one head, and rounds it.
void rotate(const fasa_append_params& p, const void* from, int64_t first, const void* norm, int head,
            int kv_head, int position, void* to, int64_t at) {
    const int dims = p.pool.head_dim;
    Row x = read(p.pool.dtype, from, first, dims);
    if (norm != nullptr) {
        const double inverse = 1 / std::sqrt(dot(x, x, dims) / dims + p.norm_eps);
        for (int d = 0; d < dims; ++d) {
            x[d] = rounded(p.pool.dtype, x[d] * inverse);
            x[d] = rounded(p.pool.dtype, x[d] * load(p.pool.dtype, norm, int64_t(head) * dims + d));
        }
    }
    for (int i = 0; i < dims / 2; ++i) {
        const double angle = position * double(p.inv_freq[kv_head * dims / 2 + i]);
        const double cos = std::cos(angle), sin = std::sin(angle),
                     scale = p.rope_scale[kv_head * dims / 2 + i];
        store(p.pool.dtype, to, at + 2 * i, scale * (x[2 * i] * cos - x[2 * i + 1] * sin));
        store(p.pool.dtype, to, at + 2 * i + 1, scale * (x[2 * i + 1] * cos + x[2 * i] * sin));
    }
}

}  // namespace

extern "C" {

fasa_status fasa_append(const fasa_append_params* params, void*) {
    const fasa_append_params& p = *params;
    const int dims = p.pool.head_dim, group = p.num_q_heads / p.pool.num_kv_heads;
    for (int token = 0; token < p.num_tokens; ++token) {
        const int seq = p.sequence[token], position = p.position[token];
        for (int head = 0; head < p.num_q_heads; ++head) {
            rotate(p, p.q, token * p.q_token_stride + head * dims, p.q_norm, head, head / group, position,
                   p.q_out, (int64_t(token) * p.num_q_heads + head) * dims);
        }
        for (int head = 0; head < p.pool.num_kv_heads; ++head) {
            rotate(p, p.k, token * p.k_token_stride + head * dims, p.k_norm, head, head, position,
                   cached(p.pool, seq, 0, position, head), 0);
            if (p.labels.kind != FASA_LABELS_PREFIX) {
                const Row key = read(p.pool.dtype, cached(p.pool, seq, 0, position, head), 0, dims);
                quantise(p.labels, key, label(p.pool, p.labels, seq, position, head));
            }
            void* value = cached(p.pool, seq, 1, position, head);
            for (int d = 0; d < dims; ++d) {
                store(p.pool.dtype, value, d,
                      load(p.pool.dtype, p.v, token * p.v_token_stride + head * dims + d));
            }
        }
    }
    return FASA_OK;
}

fasa_status fasa_prefill(const fasa_prefill_params* params, void*) {
    const fasa_prefill_params& p = *params;
    const int dims = p.pool.head_dim, group = p.num_q_heads / p.pool.num_kv_heads;
    int64_t token = 0;
    for (int seq = 0; seq < p.num_seqs; ++seq) {
        for (int i = 0; i < p.query_lengths[seq]; ++i, ++token) {
            const int seen = p.lengths[seq] - p.query_lengths[seq] + i + 1;
            const auto tokens = range(p.window > 0 ? std::max(seen - p.window, 0) : 0, seen);
            for (int head = 0; head < p.num_q_heads; ++head) {
                const Row q = read(p.pool.dtype, p.q, token * p.q_token_stride + head * dims, dims);
                attend(p.pool, seq, head / group, q, tokens, p.scale, p.out,
                       (token * p.num_q_heads + head) * dims);
            }
        }
    }
    return token == p.num_tokens ? FASA_OK : FASA_BAD_ARGUMENT;
}

fasa_status fasa_decode(const fasa_decode_params* params, void*) {
    return decode(*params, true);
}
fasa_status fasa_dense_decode(const fasa_decode_params* params, void*) {
    return decode(*params, false);
}
size_t fasa_decode_workspace(const fasa_decode_params*) {
    return 0;
}
size_t fasa_dense_decode_workspace(const fasa_decode_params*) {
    return 0;
}
size_t fasa_prefill_workspace(const fasa_prefill_params*) {
    return 0;
}
fasa_status fasa_reserve_l2() {
    return FASA_UNSUPPORTED;
}
const char* fasa_status_text(fasa_status) {
    return "refused";
}
cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
    return "";
}
}

bool fasa::list_tokens(const int32_t* sequence_length, const int32_t* context_lengths, int32_t num_contexts,
                       int32_t, int32_t num_seqs, int32_t* sequence, int32_t* position, void*) {
    for (int seq = 0, token = 0; seq < num_seqs; ++seq) {
        const int count = seq < num_contexts ? context_lengths[seq] : 1;
        for (int i = 0; i < count; ++i, ++token) {
            sequence[token] = seq;
            position[token] = sequence_length[seq] - count + i;
        }
    }
    return true;
}
