#define FASA_HEAD_DIM 256
#include "prefill.cuh"

template fasa_status fasa::launch_prefill<256>(const fasa_prefill_params&, const PrefillTile*, int,
                                               cudaStream_t);
