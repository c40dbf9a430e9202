// A reservation that pages are mapped into and out of: the memory behind one view.
#pragma once

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

// `count` pages side by side, the first at `page` pages from the start of the buffer.
struct PageRange {
  int64_t page;
  int64_t count;
};

// Invariant: every page taken from the pool is mapped exactly once. Map and Unmap are all or nothing and safe to call
// from any thread. An exported view holds a shared_ptr to its buffer, so that neither addresses nor pages go away
// under it.
class PagedBuffer {
 public:
  // `bytes` must be a multiple of the pool's page size.
  PagedBuffer(std::shared_ptr<PagePool> pool, size_t bytes);
  ~PagedBuffer();
  PagedBuffer(const PagedBuffer&) = delete;
  PagedBuffer& operator=(const PagedBuffer&) = delete;

  // Maps pages of the pool to all ranges. With `zero` they hold zeros when this returns, whoever wrote them before. Throws std::invalid_argument (outside the buffer, or mapped already), OutOfPages, DriverError; then
  // nothing has changed.
  void Map(const std::vector<PageRange>& ranges, bool zero);

  // Unmaps all ranges and gives their pages back to the pool. The caller knows that no program uses them any more.
  // Throws std::invalid_argument (not mapped) or DriverError; then nothing has changed.
  void Unmap(const std::vector<PageRange>& ranges);

  uintptr_t address() const { return reservation_.address(); }
  size_t bytes() const { return reservation_.bytes(); }
  int64_t mapped_pages() const;
  const PagePool& pool() const { return *pool_; }

 private:
  struct MappedPage {
    Page page;
    Mapping mapping;  // declared last: unmapped before its page is released
  };

  // The page numbers of all ranges, ascending. Throws std::invalid_argument if one is outside or named twice.
  std::vector<int64_t> Expand(const std::vector<PageRange>& ranges) const;
  // Takes a page out of the table; its mapping is undone if it still stands.
  Page Detach(int64_t number);
  void MapAgain(int64_t number, Page page) noexcept;

  const std::shared_ptr<PagePool> pool_;
  Reservation reservation_;
  mutable std::mutex mutex_;
  std::map<int64_t, MappedPage> mapped_;  // by page number
};

}  // namespace jax_vattention
