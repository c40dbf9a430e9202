// XLA FFI custom calls on CUDA. They launch kernels and do no host work, so XLA may capture them in a CUDA graph.

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <string>
#include <utility>

#include "append.h"
#include "driver.h"
#include "handlers.h"

namespace jax_vattention {

namespace ffi = xla::ffi;

namespace {

constexpr int kMaxDevices = 64;
constexpr unsigned kMaxThreads = 256;

struct AppendKernels {
  CUfunction by_16_bytes = nullptr;
  CUfunction by_2_bytes = nullptr;
  CUfunction by_1_byte = nullptr;
  std::atomic<bool> loaded{false};

  // The kernel that copies the widest words that fit, and their bytes. k, v and the views start at multiples of 16; so
  // do all parts of them when a part is one, and likewise for 2.
  std::pair<CUfunction, int64_t> For(int64_t part_bytes) const {
    if (part_bytes % 16 == 0) return {by_16_bytes, 16};
    if (part_bytes % 2 == 0) return {by_2_bytes, 2};
    return {by_1_byte, 1};
  }
};

// Loaded modules live as long as the process: programs that were compiled keep calling into them.
std::array<AppendKernels, kMaxDevices>& Kernels() {
  static auto* kernels = new std::array<AppendKernels, kMaxDevices>();
  return *kernels;
}

ffi::Error Failed(const std::exception& error) { return ffi::Error(ffi::ErrorCode::kInternal, error.what()); }

ffi::Error AppendCuda(CUstream stream, int32_t ordinal, ffi::AnyBuffer k_view, ffi::AnyBuffer v_view, ffi::AnyBuffer k,
                      ffi::AnyBuffer v, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> slots,
                      ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::PRED> mask, ffi::Buffer<ffi::S32> mapped,
                      ffi::Buffer<ffi::S32> order, AppendResult order_out) {
  auto decoded = DecodeAppend(k_view, v_view, k, v, layer, slots, positions, mask, mapped, order, order_out);
  if (!decoded) return decoded.error();
  AppendArgs args = *decoded;
  if (args.tokens == 0) return ffi::Error::Success();
  if (ordinal < 0 || ordinal >= kMaxDevices || !Kernels()[ordinal].loaded) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      "append: its kernel is not loaded on CUDA device " + std::to_string(ordinal) +
                          "; a KVCacheManager on that device loads it");
  }
  const auto [kernel, word_bytes] = Kernels()[ordinal].For(args.part_bytes);
  const int64_t words = args.part_bytes / word_bytes;
  const unsigned threads = static_cast<unsigned>(std::min<int64_t>(kMaxThreads, (words + 31) / 32 * 32));
  void* parameters[] = {&args};
  try {
    driver::Check(driver::Get().cuLaunchKernel(kernel, static_cast<unsigned>(args.tokens), 1, 1, threads, 1, 1, 0,
                                               stream, parameters, nullptr),
                  "cuLaunchKernel", "append of " + std::to_string(args.tokens) + " tokens");
  } catch (const std::exception& error) {
    return Failed(error);
  }
  return ffi::Error::Success();
}

}  // namespace

void LoadAppendKernel(int ordinal, const void* image) {
  if (ordinal < 0 || ordinal >= kMaxDevices) {
    throw std::invalid_argument("device ordinal: expected 0 to " + std::to_string(kMaxDevices - 1) + ", got " +
                                std::to_string(ordinal));
  }
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  AppendKernels& kernels = Kernels()[ordinal];
  if (kernels.loaded) return;
  // Leaked with the module: see Kernels().
  const auto* context = new driver::PrimaryContext(ordinal);
  driver::ScopedContext current(context->get());
  current.Require();
  const driver::Api& api = driver::Get();
  CUmodule module;
  driver::Check(api.cuModuleLoadData(&module, image), "cuModuleLoadData", "loading append.cu");
  // Found now and not at the first launch: that may be inside a graph capture, where nothing can be loaded.
  driver::Check(api.cuModuleGetFunction(&kernels.by_16_bytes, module, "append_16"), "cuModuleGetFunction", "append_16");
  driver::Check(api.cuModuleGetFunction(&kernels.by_2_bytes, module, "append_2"), "cuModuleGetFunction", "append_2");
  driver::Check(api.cuModuleGetFunction(&kernels.by_1_byte, module, "append_1"), "cuModuleGetFunction", "append_1");
  kernels.loaded = true;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AppendCudaHandler, AppendCuda,
    BindAppend(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<CUstream>>().Ctx<ffi::DeviceOrdinal>()),
    {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_vattention
