// CUDA backend: the driver's virtual memory management on the device's primary context.
// Source: CUDA Driver API, "Virtual Memory Management".

#include <cstdio>

#include "driver.h"
#include "vmm.h"

namespace jax_vattention {
namespace {

using driver::Check;
using driver::LogIfFailed;
using driver::ScopedContext;

std::string Describe(uintptr_t address, size_t bytes) {
  char text[64];
  std::snprintf(text, sizeof(text), "%zu bytes at 0x%zx", bytes, static_cast<size_t>(address));
  return text;
}

class CudaMemory final : public Memory {
 public:
  explicit CudaMemory(int ordinal) : ordinal_(ordinal), api_(driver::Get()), context_(ordinal) {
    int supported = 0;
    Check(api_.cuDeviceGetAttribute(&supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                                    context_.device()),
          "cuDeviceGetAttribute", "asking for virtual memory management");
    if (!supported) throw DriverUnavailable("this CUDA device has no virtual memory management");
    ScopedContext current(context_.get());
    current.Require();
    const CUmemAllocationProp properties = Properties();
    Check(api_.cuMemGetAllocationGranularity(&granularity_, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
          "cuMemGetAllocationGranularity", "opening the device");
    // Its own stream: zeroing waits for nothing that XLA has queued.
    Check(api_.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate", "opening the device");
  }

  ~CudaMemory() override {
    ScopedContext current(context_.get());
    if (current.ok()) LogIfFailed(api_.cuStreamDestroy(stream_), "cuStreamDestroy", "closing the device");
  }

  const char* platform() const override { return "cuda"; }
  int ordinal() const override { return ordinal_; }
  size_t granularity() const override { return granularity_; }

  MemoryInfo Info() override {
    const Scope scope(*this, "cuMemGetInfo", "asking for free memory");
    size_t free = 0;
    size_t total = 0;
    scope.Check(api_.cuMemGetInfo(&free, &total));
    return {free, total};
  }

  Handle CreatePage(size_t bytes) override {
    const Scope scope(*this, "cuMemCreate", "creating a page of " + std::to_string(bytes) + " bytes");
    const CUmemAllocationProp properties = Properties();
    CUmemGenericAllocationHandle handle = 0;
    scope.Check(api_.cuMemCreate(&handle, bytes, &properties, 0));
    return handle;
  }

  void ReleasePage(Handle page, size_t bytes) noexcept override {
    const std::string state = "releasing a page of " + std::to_string(bytes) + " bytes";
    CountCleanUp("cuMemRelease", state);
    ScopedContext current(context_.get());
    if (current.ok()) LogIfFailed(api_.cuMemRelease(page), "cuMemRelease", state);
  }

  uintptr_t Reserve(size_t bytes) override {
    const Scope scope(*this, "cuMemAddressReserve",
                      "reserving " + std::to_string(bytes) + " bytes of virtual addresses");
    CUdeviceptr address = 0;
    scope.Check(api_.cuMemAddressReserve(&address, bytes, 0, 0, 0));
    return address;
  }

  void ReleaseReservation(uintptr_t address, size_t bytes) noexcept override {
    const std::string state = "releasing " + Describe(address, bytes);
    CountCleanUp("cuMemAddressFree", state);
    ScopedContext current(context_.get());
    if (current.ok()) LogIfFailed(api_.cuMemAddressFree(address, bytes), "cuMemAddressFree", state);
  }

  void Map(uintptr_t address, size_t bytes, Handle page) override {
    const std::string state = "mapping " + Describe(address, bytes);
    {
      const Scope scope(*this, "cuMemMap", state);
      scope.Check(api_.cuMemMap(address, bytes, 0, page, 0));
    }
    try {
      const Scope scope(*this, "cuMemSetAccess", state);
      CUmemAccessDesc access = {};
      access.location = Location();
      access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
      scope.Check(api_.cuMemSetAccess(address, bytes, &access, 1));
    } catch (...) {
      ScopedContext current(context_.get());
      if (current.ok()) LogIfFailed(api_.cuMemUnmap(address, bytes), "cuMemUnmap", "undoing: " + state);
      throw;
    }
  }

  void Unmap(uintptr_t address, size_t bytes) override {
    const Scope scope(*this, "cuMemUnmap", "unmapping " + Describe(address, bytes));
    const CUresult result = api_.cuMemUnmap(address, bytes);
    // At process exit the driver has unmapped everything itself.
    if (result == CUDA_ERROR_DEINITIALIZED) return;
    scope.Check(result);
  }

  void Zero(const std::vector<Range>& ranges) override {
    try {
      for (const Range& range : ranges) {
        const Scope scope(*this, "cuMemsetD8Async", "zeroing " + Describe(range.address, range.bytes));
        scope.Check(api_.cuMemsetD8Async(range.address, 0, range.bytes, stream_));
      }
      // One wait for all of them: it costs more than the writes.
      const Scope scope(*this, "cuStreamSynchronize", "zeroing " + std::to_string(ranges.size()) + " ranges");
      scope.Check(api_.cuStreamSynchronize(stream_));
    } catch (...) {
      // Those that were queued may still be writing, to pages that the caller is about to unmap.
      ScopedContext current(context_.get());
      if (current.ok()) LogIfFailed(api_.cuStreamSynchronize(stream_), "cuStreamSynchronize", "undoing a zeroing");
      throw;
    }
  }

 protected:
  void Refuse(const char* call, const std::string& state, bool out_of_memory) const override {
    Check(out_of_memory ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_UNKNOWN, call, state);
  }

 private:
  // One counted driver call with the device's context current.
  class Scope {
   public:
    Scope(CudaMemory& memory, const char* call, std::string state)
        : call_(call), state_(std::move(state)), current_(memory.context_.get()) {
      memory.CountCall(call, state_);
    }
    void Check(CUresult result) const {
      // The driver is gone at process exit, and with it the context: not worth an error of its own.
      if (current_.ok() || result == CUDA_SUCCESS) return driver::Check(result, call_, state_);
      current_.Require();
    }

   private:
    const char* call_;
    const std::string state_;
    const ScopedContext current_;
  };

  CUmemLocation Location() const {
    CUmemLocation location = {};
    location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    location.id = ordinal_;
    return location;
  }

  CUmemAllocationProp Properties() const {
    CUmemAllocationProp properties = {};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = Location();
    return properties;
  }

  const int ordinal_;
  const driver::Api& api_;
  const driver::PrimaryContext context_;
  size_t granularity_ = 0;
  CUstream stream_ = nullptr;
};

}  // namespace

std::shared_ptr<Memory> OpenCudaMemory(int ordinal) { return std::make_shared<CudaMemory>(ordinal); }

}  // namespace jax_vattention
