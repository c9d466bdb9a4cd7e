#include "probe.h"

extern "C" __attribute__((visibility("default"))) void* probe_make(int which) {
    switch (which) {
        case 0:
            return static_cast<nvinfer1::IPluginV3OneCore*>(new probe::Core);
        case 1:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(new probe::Build);
        case 2:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(new probe::Runtime);
        case 3:
            return static_cast<nvinfer1::IPluginV3*>(new probe::Plugin);
        default:
            return static_cast<nvinfer1::IPluginCreatorV3One*>(new probe::Creator);
    }
}

extern "C" __attribute__((visibility("default"))) void* probe_address(int number) {
    return probe::address<void>(number);
}
