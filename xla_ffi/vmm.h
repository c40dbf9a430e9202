// Virtual memory in three owners over two backends.
//
//   Page         a piece of physical memory
//   Reservation  a range of virtual addresses with nothing behind it
//   Mapping      a page attached to a place in a reservation
//
// Each is move-only and undoes exactly what it did: a mapping unmaps but frees neither its page nor its reservation.
// The caller destroys a mapping before the page and the reservation that it joins. Destructors never throw: they log.
// Sizes and offsets are in bytes and multiples of Memory::granularity().
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"

namespace jax_vattention {

struct MemoryInfo {
  uint64_t free_bytes;
  uint64_t total_bytes;
};

// The primitive operations of one backend on one device. Each either happens or throws DriverError and changes
// nothing. Safe to call from any thread.
class Memory {
 public:
  using Handle = uint64_t;
  struct Range {
    uintptr_t address;
    size_t bytes;
  };

  virtual ~Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  virtual const char* platform() const = 0;
  virtual int ordinal() const = 0;
  virtual size_t granularity() const = 0;
  virtual MemoryInfo Info() = 0;

  virtual Handle CreatePage(size_t bytes) = 0;
  virtual uintptr_t Reserve(size_t bytes) = 0;
  // Attaches a page and makes it readable and writable.
  virtual void Map(uintptr_t address, size_t bytes, Handle page) = 0;
  // Writes zeros to mapped addresses; done when it returns.
  virtual void Zero(const std::vector<Range>& ranges) = 0;
  // Detaches one mapping. Throws where a caller can still act on it; the destructor of Mapping logs.
  virtual void Unmap(uintptr_t address, size_t bytes) = 0;

  virtual void ReleasePage(Handle page, size_t bytes) noexcept = 0;
  virtual void ReleaseReservation(uintptr_t address, size_t bytes) noexcept = 0;

  // For tests: lets `calls` more backend calls succeed, then makes the next `times` fail with out-of-memory (or with an
  // ordinary error), as the backend itself would report it. Those calls are not made; but what a clean-up was to
  // release is released all the same, so that a test finds no leak that it made itself.
  void InjectFailure(int64_t calls, bool out_of_memory, int64_t times = 1);
  // Failures injected since this memory was opened.
  int64_t injected() const;

  // For tests: every backend call takes this much longer, so that work in the background is seen under way.
  void SetDelay(int64_t microseconds) { delay_microseconds_ = microseconds; }

  // Calls into the driver or the kernel since this memory was opened, by name, those that failed
  // and those of clean-up too.
  std::map<std::string, int64_t> calls() const;

 protected:
  Memory() = default;
  // Stands before every driver call. `call` is a literal.
  void CountCall(const char* call, const std::string& state);
  // The same before a call that nobody could be told the failure of: it is logged.
  void CountCleanUp(const char* call, const std::string& state) noexcept;
  // Throws what this call throws when the backend refuses it.
  virtual void Refuse(const char* call, const std::string& state, bool out_of_memory) const = 0;

 private:
  mutable std::mutex mutex_;
  std::map<std::string_view, int64_t> calls_;  // the names are literals
  int64_t injected_ = 0;
  int64_t calls_until_failure_ = 0;
  int64_t failures_ahead_ = 0;
  bool fail_out_of_memory_ = true;
  std::atomic<int64_t> delay_microseconds_{0};
};

// mmap and memfd. Addresses that are not mapped read as zeros, or fault when `strict`.
std::shared_ptr<Memory> OpenHostMemory(bool strict);
// The CUDA driver on the primary context of a device. Throws DriverUnavailable where there is no driver.
std::shared_ptr<Memory> OpenCudaMemory(int ordinal);

class Page {
 public:
  Page(std::shared_ptr<Memory> memory, size_t bytes);
  ~Page();
  Page(Page&& other) noexcept;
  Page& operator=(Page&&) = delete;

  Memory::Handle handle() const { return handle_; }
  size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<Memory> memory_;  // null once moved from
  size_t bytes_;
  Memory::Handle handle_;
};

class Reservation {
 public:
  Reservation(std::shared_ptr<Memory> memory, size_t bytes);
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  uintptr_t address() const { return address_; }
  size_t bytes() const { return bytes_; }
  Memory& memory() const { return *memory_; }

 private:
  std::shared_ptr<Memory> memory_;
  size_t bytes_;
  uintptr_t address_;
};

class Mapping {
 public:
  Mapping(Reservation& reservation, size_t offset, const Page& page);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&&) = delete;

  // Detaches now and throws DriverError if that fails, in which case the page is still mapped.
  void Unmap();

 private:
  Memory* memory_;  // null once moved from or unmapped
  uintptr_t address_;
  size_t bytes_;
};

}  // namespace jax_vattention
