#define FASA_HEAD_DIM 128
#include "dense_decode.cuh"

template fasa_status fasa::launch_dense_chunks<128>(const fasa_decode_params&, int, const Partials&,
                                                    cudaStream_t);
