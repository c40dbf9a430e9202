#include "page_pool.h"

#include <string>
#include <utility>

namespace jax_vattention {

PagePool::PagePool(std::shared_ptr<Memory> memory, size_t page_bytes, int64_t total_pages)
    : memory_(std::move(memory)), page_bytes_(page_bytes), total_pages_(total_pages) {
  const size_t granularity = memory_->granularity();
  if (page_bytes == 0 || page_bytes % granularity != 0) {
    throw std::invalid_argument("page_bytes: expected a multiple of the " + std::string(memory_->platform()) +
                                " backend's granularity, " + std::to_string(granularity) + " bytes, got " +
                                std::to_string(page_bytes));
  }
  if (total_pages <= 0) {
    throw std::invalid_argument("the pool is too small for one page of " + std::to_string(page_bytes) +
                                " bytes: give it more bytes, or choose smaller pages");
  }
}

std::vector<Page> PagePool::Take(int64_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t available = total_pages_ - taken_;
  if (count > available) {
    throw OutOfPages("needed " + std::to_string(count) + " pages of " + std::to_string(page_bytes_) + " bytes, " +
                     std::to_string(available) + " of " + std::to_string(total_pages_) + " are free");
  }
  std::vector<Page> pages;
  pages.reserve(count);
  while (static_cast<int64_t>(pages.size()) < count && !free_.empty()) {
    pages.push_back(std::move(free_.back()));
    free_.pop_back();
  }
  try {
    while (static_cast<int64_t>(pages.size()) < count) pages.emplace_back(memory_, page_bytes_);
  } catch (...) {
    for (Page& page : pages) free_.push_back(std::move(page));
    throw;
  }
  taken_ += count;
  return pages;
}

void PagePool::Give(std::vector<Page> pages) noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  taken_ -= static_cast<int64_t>(pages.size());
  for (Page& page : pages) free_.push_back(std::move(page));
}

int64_t PagePool::free_pages() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return total_pages_ - taken_;
}

int64_t PagePool::created_pages() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(free_.size()) + taken_;
}

}  // namespace jax_vattention
