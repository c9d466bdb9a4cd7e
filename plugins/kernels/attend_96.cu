#include "select_attend.cuh"

template fasa_status fasa::launch_attend<96>(const fasa_decode_params&, const Scores&, const Partials&,
                                             cudaStream_t);
