// The custom calls that this library registers with XLA.
#pragma once

#include <cstddef>

#include "xla/ffi/api/c_api.h"

namespace jax_vattention {

extern "C" XLA_FFI_Error* AppendCpuHandler(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* ReadTileCpuHandler(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* AppendCudaHandler(XLA_FFI_CallFrame* call_frame);

// Loads the compiled append.cu for a device, once. AppendCudaHandler fails with a clear error until this was called.
void LoadAppendKernel(int ordinal, const void* image);

}  // namespace jax_vattention
