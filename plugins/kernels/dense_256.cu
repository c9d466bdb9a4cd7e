#include "dense_decode.cuh"

template fasa_status fasa::launch_dense<256>(const fasa_decode_params&, const Partials&, cudaStream_t);
