// A reservation that pages are mapped into and out of: the memory behind the views of one group of layers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "page_pool.h"
#include "vmm.h"

namespace jax_vattention {

// Pages side by side. `page` counts the smallest pages of the pool from the start of the buffer; each of the `count`
// pages is as large as `span` of those.
struct PageRange {
  int64_t page;
  int64_t count;
  int64_t span = 1;
};

// Invariant: every page taken from the pool is mapped exactly once. Map, Unmap and Zero are all or nothing (but for
// bytes that Zero wrote) and safe to call from any thread. An exported view holds a shared_ptr to its buffer, so that
// neither addresses nor pages go away under it.
class PagedBuffer {
 public:
  // `bytes` must be a multiple of the pool's smallest page.
  PagedBuffer(std::shared_ptr<PagePool> pool, size_t bytes);
  ~PagedBuffer();
  PagedBuffer(const PagedBuffer&) = delete;
  PagedBuffer& operator=(const PagedBuffer&) = delete;

  // Maps pages of the pool to all ranges. With `zero` they hold zeros when this returns, whoever wrote them before.
  // Throws std::invalid_argument (outside the buffer, or mapped already), OutOfPages, DriverError; then nothing has
  // changed.
  void Map(const std::vector<PageRange>& ranges, bool zero);

  // Unmaps all ranges, named as they were mapped, and gives their pages back to the pool. The caller knows that no
  // program uses them any more. Throws std::invalid_argument (not mapped so) or DriverError; then nothing has changed.
  void Unmap(const std::vector<PageRange>& ranges);

  // Writes zeros to all ranges, which are mapped, in pages of whatever size. They are there when this returns. Throws
  // std::invalid_argument or DriverError.
  void Zero(const std::vector<PageRange>& ranges);

  uintptr_t address() const { return reservation_.address(); }
  size_t bytes() const { return reservation_.bytes(); }
  // In smallest pages. Does not wait for work in progress.
  int64_t mapped_pages() const { return mapped_pages_; }
  const PagePool& pool() const { return *pool_; }

 private:
  struct MappedPage {
    Page page;
    Mapping mapping;  // declared last: unmapped before its page is released
  };
  struct Place {
    int64_t page;
    int64_t span;
  };

  // Where the pages of all ranges lie, ascending. Throws std::invalid_argument if one is outside or two overlap.
  std::vector<Place> Expand(const std::vector<PageRange>& ranges) const;
  // Whether any of these smallest pages is mapped.
  bool Overlaps(const Place& place) const;
  bool Covered(int64_t page, int64_t count) const;
  std::vector<Memory::Range> Addresses(const std::vector<PageRange>& ranges) const;
  // Takes a page out of the table; its mapping is undone if it still stands.
  Page Detach(int64_t number);
  void MapAgain(int64_t number, Page page) noexcept;

  const std::shared_ptr<PagePool> pool_;
  Reservation reservation_;
  std::mutex mutex_;
  std::map<int64_t, MappedPage> mapped_;  // by the number of its first smallest page
  std::atomic<int64_t> mapped_pages_{0};
};

}  // namespace jax_vattention
