#define FASA_HEAD_DIM 64
#include "prefill.cuh"

template fasa_status fasa::launch_prefill<64>(const fasa_prefill_params&, const PrefillTile*, int,
                                              cudaStream_t);
