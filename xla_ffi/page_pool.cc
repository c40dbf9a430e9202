#include "page_pool.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

namespace jax_vattention {

PagePool::PagePool(std::shared_ptr<Memory> memory, std::vector<size_t> page_bytes, size_t total_bytes)
    : memory_(std::move(memory)) {
  size_t unit = memory_->granularity();
  for (const size_t bytes : page_bytes) {
    const bool first = shelves_.empty();
    if (bytes == 0 || bytes % unit != 0 || (!first && bytes == unit)) {
      throw std::invalid_argument(
          "page_bytes: expected a multiple of " +
          (first ? "the " + std::string(memory_->platform()) + " backend's granularity, " : "the size before it, ") +
          std::to_string(unit) + " bytes, got " + std::to_string(bytes));
    }
    shelves_.emplace_back(bytes);
    unit = bytes;
  }
  if (shelves_.empty()) throw std::invalid_argument("page_bytes: expected at least one size, got none");
  total_bytes_ = total_bytes / this->page_bytes() * this->page_bytes();
  if (total_bytes_ == 0) {
    throw std::invalid_argument("the pool is too small for one page of " + std::to_string(this->page_bytes()) +
                                " bytes: give it more bytes, or choose smaller pages");
  }
}

std::vector<Page> PagePool::Take(const std::vector<size_t>& sizes) {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t needed = 0;
  for (const size_t bytes : sizes) {
    ShelfOf(bytes);
    needed += bytes;
  }
  if (needed > free_bytes()) {
    throw OutOfPages("needed " + std::to_string(needed / page_bytes()) + " pages of " + std::to_string(page_bytes()) +
                     " bytes, " + std::to_string(free_bytes() / page_bytes()) + " of " +
                     std::to_string(total_bytes_ / page_bytes()) + " are free");
  }
  std::vector<std::optional<Page>> found(sizes.size());
  const auto put_back = [&] {
    for (std::optional<Page>& page : found) {
      if (page) ShelfOf(page->bytes()).idle.push_back(std::move(*page));
    }
  };
  // Idle pages first, all of them: what is idle after that may be released to make others.
  for (size_t i = 0; i < sizes.size(); ++i) {
    std::vector<Page>& idle = ShelfOf(sizes[i]).idle;
    if (idle.empty()) continue;
    found[i].emplace(std::move(idle.back()));
    idle.pop_back();
  }
  try {
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (!found[i]) found[i].emplace(Make(ShelfOf(sizes[i])));
    }
  } catch (...) {
    put_back();
    throw;
  }
  std::vector<Page> pages;
  pages.reserve(sizes.size());
  for (std::optional<Page>& page : found) pages.push_back(std::move(*page));
  for (const size_t bytes : sizes) ++ShelfOf(bytes).taken;
  taken_bytes_ += needed;
  return pages;
}

Page PagePool::Make(Shelf& shelf) {
  while (created_bytes_ + shelf.page_bytes > total_bytes_) {
    if (!ReleaseOne()) throw std::logic_error("the pool's pages do not add up: report this");
  }
  for (;;) {
    try {
      Page page(memory_, shelf.page_bytes);
      ++shelf.created;
      created_bytes_ += shelf.page_bytes;
      return page;
    } catch (const DriverError& error) {
      // The device may be full because of what lies idle here.
      if (!error.out_of_memory || !ReleaseOne()) throw;
    }
  }
}

bool PagePool::ReleaseOne() {
  for (auto shelf = shelves_.rbegin(); shelf != shelves_.rend(); ++shelf) {
    if (shelf->idle.empty()) continue;
    shelf->idle.pop_back();
    --shelf->created;
    created_bytes_ -= shelf->page_bytes;
    return true;
  }
  return false;
}

void PagePool::Give(std::vector<Page> pages) noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Page& page : pages) {
    Shelf& shelf = ShelfOf(page.bytes());
    taken_bytes_ -= page.bytes();
    --shelf.taken;
    shelf.idle.push_back(std::move(page));
  }
}

PagePool::Shelf& PagePool::ShelfOf(size_t bytes) {
  for (Shelf& shelf : shelves_) {
    if (shelf.page_bytes == bytes) return shelf;
  }
  throw std::invalid_argument("the pool has no pages of " + std::to_string(bytes) + " bytes");
}

std::vector<PagePool::Count> PagePool::counts() const {
  std::vector<Count> counts;
  for (const Shelf& shelf : shelves_) {
    const int64_t taken = shelf.taken;
    const int64_t created = shelf.created;
    // Pages may have been given back and released between the two reads.
    counts.push_back({shelf.page_bytes, created, std::max<int64_t>(0, created - taken)});
  }
  return counts;
}

}  // namespace jax_vattention
