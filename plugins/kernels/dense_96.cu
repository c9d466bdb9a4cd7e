#define FASA_HEAD_DIM 96
#include "dense_decode.cuh"

template fasa_status fasa::launch_dense_chunks<96>(const fasa_decode_params&, int, const Partials&,
                                                   cudaStream_t);
