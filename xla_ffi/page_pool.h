// Physical pages of one size: made when first needed, kept for reuse, never more than a set number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "vmm.h"

namespace jax_vattention {

// Thrown where a pool cannot give the pages asked for. Nothing has been taken.
class OutOfPages : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Invariant: free_pages() + pages taken and not given back == total_pages(). A page that was never made counts as
// free. Safe to call from any thread.
class PagePool {
 public:
  // `page_bytes` must be a multiple of the memory's granularity. Throws std::invalid_argument if it is not.
  PagePool(std::shared_ptr<Memory> memory, size_t page_bytes, int64_t total_pages);

  // Takes `count` pages, all or none. Throws OutOfPages, or DriverError where making a page failed.
  std::vector<Page> Take(int64_t count);
  void Give(std::vector<Page> pages) noexcept;

  const std::shared_ptr<Memory>& memory() const { return memory_; }
  size_t page_bytes() const { return page_bytes_; }
  int64_t total_pages() const { return total_pages_; }
  int64_t free_pages() const;
  // Pages that exist, taken or free: what the pool holds of the device's memory.
  int64_t created_pages() const;

 private:
  const std::shared_ptr<Memory> memory_;
  const size_t page_bytes_;
  const int64_t total_pages_;
  mutable std::mutex mutex_;
  std::vector<Page> free_;  // the last given back is taken first: its lines may still be in a cache
  int64_t taken_ = 0;
};

}  // namespace jax_vattention
