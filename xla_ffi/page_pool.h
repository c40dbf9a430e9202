// Physical pages of one or several sizes out of one budget of bytes: made when first needed, kept for reuse.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
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

// Invariant: free_bytes() + bytes of pages taken and not given back == total_bytes(). Bytes that no page was made of yet
// count as free. How the budget is split between sizes follows the load: idle pages of one size are released where
// their bytes are needed for another. Safe to call from any thread; the counts never wait for the driver.
class PagePool {
 public:
  struct Count {
    size_t page_bytes;
    int64_t created;  // pages of this size that exist
    int64_t idle;     // and are not taken; those of a job under way are not taken yet
  };

  // `page_bytes` ascend, each a multiple of the memory's granularity and of the size before it; `total_bytes` is
  // rounded down to whole pages of the first size. Throws std::invalid_argument.
  PagePool(std::shared_ptr<Memory> memory, std::vector<size_t> page_bytes, size_t total_bytes);

  // Takes a page of each of these sizes, all or none, in the same order. Throws OutOfPages, DriverError where making a
  // page failed, or std::invalid_argument for a size that the pool does not have.
  std::vector<Page> Take(const std::vector<size_t>& sizes);
  void Give(std::vector<Page> pages) noexcept;

  const std::shared_ptr<Memory>& memory() const { return memory_; }
  // The smallest size: offsets into buffers are counted in it.
  size_t page_bytes() const { return shelves_.front().page_bytes; }
  size_t total_bytes() const { return total_bytes_; }
  size_t free_bytes() const { return total_bytes_ - taken_bytes_; }
  // Bytes of all pages that exist, taken or idle: what the pool holds of the device's memory.
  size_t created_bytes() const { return created_bytes_; }
  std::vector<Count> counts() const;

 private:
  struct Shelf {
    explicit Shelf(size_t bytes) : page_bytes(bytes) {}
    const size_t page_bytes;
    std::vector<Page> idle;  // the last given back is taken first: its lines may still be in a cache
    // Changed under the mutex; read without it.
    std::atomic<int64_t> created{0};
    std::atomic<int64_t> taken{0};
  };

  Shelf& ShelfOf(size_t bytes);
  // Makes a page, out of the bytes of idle pages where nothing else is left.
  Page Make(Shelf& shelf);
  // Releases one idle page, of the largest size that has any. False if there is none.
  bool ReleaseOne();

  const std::shared_ptr<Memory> memory_;
  size_t total_bytes_;
  std::mutex mutex_;            // held while pages are made: the driver takes its time
  std::deque<Shelf> shelves_;  // ascending; stays where it is
  std::atomic<size_t> taken_bytes_{0};
  std::atomic<size_t> created_bytes_{0};
};

}  // namespace jax_vattention
