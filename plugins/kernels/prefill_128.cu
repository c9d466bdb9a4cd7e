#define FASA_HEAD_DIM 128
#include "prefill.cuh"

template fasa_status fasa::launch_prefill<128>(const fasa_prefill_params&, const PrefillTile*, int,
                                               cudaStream_t);
