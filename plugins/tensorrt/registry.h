// TensorRT's plugin registry as far as its registerCreator, in TensorRT 10 and in TensorRT 11: the same
// method in different places. Linux only: other compilers order overloaded methods in another way.
#pragma once

#include "tensorrt.h"

namespace fasa {

class Registry10 {
  public:
    virtual bool registerOldCreator(void* creator, char const* name_space) noexcept = 0;
    virtual void* getPluginCreatorList(int32_t* count) const noexcept = 0;
    virtual void* getPluginCreator(char const* name, char const* version,
                                   char const* name_space) noexcept = 0;

  protected:
    virtual ~Registry10() noexcept = default;

  public:
    virtual void setErrorRecorder(void* recorder) noexcept = 0;
    virtual void* getErrorRecorder() const noexcept = 0;
    virtual bool deregisterOldCreator(void const* creator) noexcept = 0;
    virtual bool isParentSearchEnabled() const = 0;
    virtual void setParentSearchEnabled(bool enabled) = 0;
    virtual void* loadLibrary(char const* path) noexcept = 0;
    virtual void deregisterLibrary(void* handle) noexcept = 0;
    virtual bool registerCreator(nvinfer1::IPluginCreatorInterface& creator,
                                 char const* name_space) noexcept = 0;
};

class Registry11 {
  protected:
    virtual ~Registry11() noexcept = default;

  public:
    virtual void setErrorRecorder(void* recorder) noexcept = 0;
    virtual void* getErrorRecorder() const noexcept = 0;
    virtual bool isParentSearchEnabled() const = 0;
    virtual void setParentSearchEnabled(bool enabled) = 0;
    virtual void* loadLibrary(char const* path) noexcept = 0;
    virtual void deregisterLibrary(void* handle) noexcept = 0;
    virtual bool registerCreator(nvinfer1::IPluginCreatorInterface& creator,
                                 char const* name_space) noexcept = 0;
};

}  // namespace fasa
