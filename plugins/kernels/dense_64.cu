#define FASA_HEAD_DIM 64
#include "dense_decode.cuh"

template fasa_status fasa::launch_dense_chunks<64>(const fasa_decode_params&, int, const Partials&,
                                                   cudaStream_t);
