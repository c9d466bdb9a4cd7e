#include "prefill_hopper.cuh"

namespace fasa {
template fasa_status launch_prefill_hopper<64, __half>(const fasa_prefill_params&, const PrefillTile*, int,
                                                       cudaStream_t);
template fasa_status launch_prefill_hopper<64, __nv_bfloat16>(const fasa_prefill_params&, const PrefillTile*,
                                                              int, cudaStream_t);
}  // namespace fasa
