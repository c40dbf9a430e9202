// The boundary to the CUDA driver. No other file calls it: symbols are found at run time, so that a build needs no
// GPU and a machine without libcuda can still import the package.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "error.h"

namespace jax_vattention::driver {

// Every driver function in use, by its header name. The headers map some of them to versioned symbols.
#define JAX_VATTENTION_DRIVER_CALLS(X) \
  X(cuInit)                            \
  X(cuGetErrorName)                    \
  X(cuDriverGetVersion)                \
  X(cuDeviceGet)                       \
  X(cuDeviceGetAttribute)              \
  X(cuDevicePrimaryCtxRetain)          \
  X(cuDevicePrimaryCtxRelease)         \
  X(cuCtxPushCurrent)                  \
  X(cuCtxPopCurrent)                   \
  X(cuMemGetInfo)                      \
  X(cuMemGetAllocationGranularity)     \
  X(cuMemAddressReserve)               \
  X(cuMemAddressFree)                  \
  X(cuMemCreate)                       \
  X(cuMemRelease)                      \
  X(cuMemMap)                          \
  X(cuMemSetAccess)                    \
  X(cuMemUnmap)                        \
  X(cuMemsetD8Async)                   \
  X(cuStreamCreate)                    \
  X(cuStreamDestroy)                   \
  X(cuStreamSynchronize)               \
  X(cuModuleLoadData)                  \
  X(cuModuleGetFunction)               \
  X(cuLaunchKernel)

struct Api {
#define X(name) decltype(&::name) name = nullptr;
  JAX_VATTENTION_DRIVER_CALLS(X)
#undef X
};

// Loads libcuda and initialises it, once. Throws DriverUnavailable (no driver) or DriverError (cuInit failed).
const Api& Get();

// The one translator: returns for CUDA_SUCCESS, throws DriverError otherwise. `state` says what was being done.
void Check(CUresult result, const char* call, const std::string& state);

// For destructors: logs a failure to stderr and never throws. A driver that is shutting down has freed everything
// itself, which is no failure.
void LogIfFailed(CUresult result, const char* call, const std::string& state) noexcept;

// Holds a reference to a device's primary context, the one that XLA uses too.
class PrimaryContext {
 public:
  explicit PrimaryContext(int ordinal);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  CUcontext get() const { return context_; }
  CUdevice device() const { return device_; }

 private:
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
};

// Makes a context current on this thread for as long as it lives.
class ScopedContext {
 public:
  explicit ScopedContext(CUcontext context);
  ~ScopedContext();
  ScopedContext(const ScopedContext&) = delete;
  ScopedContext& operator=(const ScopedContext&) = delete;

  // False where the driver refused (it is shutting down): nothing can be, or needs to be, done.
  bool ok() const { return result_ == CUDA_SUCCESS; }
  void Require() const { Check(result_, "cuCtxPushCurrent", "making the primary context current"); }

 private:
  CUresult result_;
};

}  // namespace jax_vattention::driver
