#define FASA_HEAD_DIM 256
#include "dense_decode.cuh"

template fasa_status fasa::launch_dense_chunks<256>(const fasa_decode_params&, int, const Partials&,
                                                    cudaStream_t);
