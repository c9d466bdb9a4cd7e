// TensorRT's plugin interface: from its own headers where the compiler was given them, else from ours.
#pragma once

#if FASA_TENSORRT_HEADERS
#include <NvInferRuntime.h>
#else
#include "v3_interface.h"
#endif
