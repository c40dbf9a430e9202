#include "driver.h"

#include <dlfcn.h>

#include <cstdio>

namespace jax_vattention::driver {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

std::string ErrorName(CUresult result) {
  const char* name = nullptr;
  if (Get().cuGetErrorName(result, &name) != CUDA_SUCCESS || name == nullptr) return "an unknown CUDA error";
  return name;
}

Api Load() {
  // Never closed: objects that outlive this library's own statics still call into it.
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw DriverUnavailable(std::string("the CUDA driver cannot be loaded: ") + dlerror() +
                            "; install an NVIDIA driver, or use the host backend (a CPU device)");
  }
  Api api;
#define STRINGIFY(name) #name
#define X(name)                                                                            \
  api.name = reinterpret_cast<decltype(&::name)>(dlsym(library, STRINGIFY(name)));         \
  if (api.name == nullptr) {                                                               \
    throw DriverUnavailable("the CUDA driver has no symbol " STRINGIFY(name)               \
                            ": it is too old; CUDA 12 or newer is needed");                \
  }
  JAX_VATTENTION_DRIVER_CALLS(X)
#undef X
#undef STRINGIFY
  return api;
}

}  // namespace

const Api& Get() {
  // Leaked on purpose: destructors that run after static destruction still need it.
  static const Api* api = new Api(Load());
  return *api;
}

void Check(CUresult result, const char* call, const std::string& state) {
  if (result == CUDA_SUCCESS) return;
  throw DriverError(call, result, ErrorName(result), state, result == CUDA_ERROR_OUT_OF_MEMORY);
}

void LogIfFailed(CUresult result, const char* call, const std::string& state) noexcept {
  if (result == CUDA_SUCCESS || result == CUDA_ERROR_DEINITIALIZED || result == CUDA_ERROR_CONTEXT_IS_DESTROYED) return;
  std::fprintf(stderr, "jax_vattention: %s failed with code %d: %s\n", call, static_cast<int>(result), state.c_str());
}

PrimaryContext::PrimaryContext(int ordinal) {
  const Api& api = Get();
  const std::string state = "opening CUDA device " + std::to_string(ordinal);
  Check(api.cuInit(0), "cuInit", state);
  Check(api.cuDeviceGet(&device_, ordinal), "cuDeviceGet", state);
  Check(api.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain", state);
}

PrimaryContext::~PrimaryContext() {
  LogIfFailed(Get().cuDevicePrimaryCtxRelease(device_), "cuDevicePrimaryCtxRelease", "closing a CUDA device");
}

ScopedContext::ScopedContext(CUcontext context) : result_(Get().cuCtxPushCurrent(context)) {}

ScopedContext::~ScopedContext() {
  if (!ok()) return;
  CUcontext popped;
  LogIfFailed(Get().cuCtxPopCurrent(&popped), "cuCtxPopCurrent", "restoring the thread's context");
}

}  // namespace jax_vattention::driver
