// Stands in for the kernels and CUDA in tests of the step's logic on a machine without either: keeps a copy
// of what each function was called with, for Python to look at.
#include <cuda_runtime_api.h>

#include "../../../plugins/tensorrt/step.h"

namespace {

struct Calls {
    int32_t appends, prefills, decodes, dense_decodes, lists;
    int32_t order[8];  // 1 list, 2 append, 3 prefill, 4 decode, 5 dense decode
    int32_t count;
    int32_t num_contexts, context_tokens, num_seqs;
    int32_t status;  // set by the test: what the kernels answer
    fasa_append_params append;
    fasa_prefill_params prefill;
    fasa_decode_params decode;
} calls;

fasa_status note(int32_t what) {
    calls.order[calls.count++ % 8] = what;
    return static_cast<fasa_status>(calls.status);
}

}  // namespace

extern "C" {

FASA_API Calls* stub_calls() {
    return &calls;
}

fasa_status fasa_append(const fasa_append_params* params, void*) {
    calls.append = *params;
    ++calls.appends;
    return note(2);
}
fasa_status fasa_prefill(const fasa_prefill_params* params, void*) {
    calls.prefill = *params;
    ++calls.prefills;
    return note(3);
}
fasa_status fasa_decode(const fasa_decode_params* params, void*) {
    calls.decode = *params;
    ++calls.decodes;
    return note(4);
}
fasa_status fasa_dense_decode(const fasa_decode_params* params, void*) {
    calls.decode = *params;
    ++calls.dense_decodes;
    return note(5);
}
size_t fasa_decode_workspace(const fasa_decode_params* params) {
    return size_t(params->num_seqs) * params->max_length * 2 + fasa_dense_decode_workspace(params);
}
size_t fasa_dense_decode_workspace(const fasa_decode_params* params) {
    return size_t(params->num_seqs) * 2 * params->num_q_heads * 4;  // two chunks of 4 bytes a query head
}
size_t fasa_prefill_workspace(const fasa_prefill_params* params) {
    return size_t(params->num_tokens) + params->num_seqs;
}
fasa_status fasa_reserve_l2() {
    return FASA_UNSUPPORTED;
}
const char* fasa_status_text(fasa_status) {
    return "the stub refuses";
}

cudaError_t cudaGetLastError() {
    return cudaErrorNoKernelImageForDevice;
}
const char* cudaGetErrorString(cudaError_t) {
    return "no kernel image";
}
}

bool fasa::list_tokens(const int32_t*, const int32_t*, int32_t num_contexts, int32_t context_tokens,
                       int32_t num_seqs, int32_t*, int32_t*, void*) {
    calls.num_contexts = num_contexts;
    calls.context_tokens = context_tokens;
    calls.num_seqs = num_seqs;
    ++calls.lists;
    note(1);
    return true;
}
