// A reservation that pages are mapped into and out of: the memory behind the views of one group of layers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
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
//
// Should the backend fail again while a failure is being undone, that is logged, the page concerned stays with the
// buffer, and the next work on the buffer puts it right first.
class PagedBuffer {
 public:
  // Ranges of several buffers, worked on as a whole.
  using Work = std::vector<std::pair<std::shared_ptr<PagedBuffer>, std::vector<PageRange>>>;

  // `bytes` must be a multiple of the pool's smallest page.
  PagedBuffer(std::shared_ptr<PagePool> pool, size_t bytes);
  ~PagedBuffer();
  PagedBuffer(const PagedBuffer&) = delete;
  PagedBuffer& operator=(const PagedBuffer&) = delete;

  // Maps pages of the pools to all ranges. With `zero` they hold zeros when this returns, whoever wrote them before.
  // Throws std::invalid_argument (outside the buffer, or mapped already), OutOfPages, DriverError; then nothing has
  // changed.
  static void Map(const Work& work, bool zero);

  // Unmaps all ranges, named as they were mapped, and gives their pages back to the pools. The caller knows that no
  // program uses them any more. Throws std::invalid_argument (not mapped so) or DriverError; then nothing has changed:
  // what was unmapped already is mapped again, the same page at the same place.
  static void Unmap(const Work& work);

  // Writes zeros to all ranges, which are mapped, in pages of whatever size. They are there when this returns. Throws
  // std::invalid_argument or DriverError.
  static void Zero(const Work& work);

  uintptr_t address() const { return reservation_.address(); }
  size_t bytes() const { return reservation_.bytes(); }
  // In smallest pages. Does not wait for work in progress.
  int64_t mapped_pages() const { return mapped_pages_; }
  const PagePool& pool() const { return *pool_; }

 private:
  struct MappedPage {
    Page page;
    std::optional<Mapping> mapping;  // declared last: unmapped before its page is released
    bool wanted;                     // else it would be gone, had the driver let go of it
  };
  using Table = std::map<int64_t, MappedPage>;  // by the number of its first smallest page
  struct Place {
    int64_t page;
    int64_t span;
  };
  // What one buffer has to do, with its lock held.
  struct Share {
    PagedBuffer* buffer;
    std::unique_lock<std::mutex> lock;
    std::vector<PageRange> ranges;
    std::vector<Place> places;  // ascending
    std::vector<Page> pages;    // of a map: taken from the pool and not mapped yet
    size_t done = 0;            // places that are mapped, or unmapped
  };

  // Locks the buffers, in an order that all threads keep, and expands their ranges.
  static std::vector<Share> Begin(const Work& work);
  // Where the pages of all ranges lie, ascending. Throws std::invalid_argument if one is outside or two overlap.
  std::vector<Place> Expand(const std::vector<PageRange>& ranges) const;
  int64_t SpanOf(const Page& page) const { return static_cast<int64_t>(page.bytes() / pool_->page_bytes()); }
  size_t OffsetOf(int64_t page) const { return page * pool_->page_bytes(); }

  void CheckFree(const std::vector<Place>& places);
  void CheckMapped(const std::vector<Place>& places) const;
  bool Covered(const PageRange& range) const;
  Table::iterator Overlapping(const Place& place);
  std::vector<Memory::Range> Addresses(const std::vector<PageRange>& ranges) const;

  void TakePages(Share& share);
  void MapPages(Share& share);
  void UndoMap(Share& share) noexcept;
  void UnmapPages(Share& share);
  void UndoUnmap(Share& share) noexcept;
  void GivePages(Share& share);

  // Takes a page, which is unmapped, out of the table.
  Page Detach(Table::iterator entry);
  // Makes a broken entry what it should be. Throws DriverError.
  void Mend(Table::iterator entry);
  void MendAll() noexcept;

  const std::shared_ptr<PagePool> pool_;
  Reservation reservation_;
  std::mutex mutex_;
  Table mapped_;
  bool broken_ = false;  // some entry may be mapped and not wanted, or wanted and not mapped
  std::atomic<int64_t> mapped_pages_{0};  // wanted ones
};

}  // namespace jax_vattention
