#include "paged_buffer.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace jax_vattention {

PagedBuffer::PagedBuffer(std::shared_ptr<PagePool> pool, size_t bytes)
    : pool_(std::move(pool)), reservation_(pool_->memory(), bytes) {
  if (bytes == 0 || bytes % pool_->page_bytes() != 0) {
    throw std::invalid_argument("a buffer of " + std::to_string(bytes) + " bytes is no whole number of pages of " +
                                std::to_string(pool_->page_bytes()) + " bytes");
  }
}

PagedBuffer::~PagedBuffer() {
  std::vector<Page> pages;
  while (!mapped_.empty()) pages.push_back(Detach(mapped_.begin()->first));
  pool_->Give(std::move(pages));
}

std::vector<int64_t> PagedBuffer::Expand(const std::vector<PageRange>& ranges) const {
  const int64_t pages = static_cast<int64_t>(bytes() / pool_->page_bytes());
  std::vector<int64_t> numbers;
  for (const PageRange& range : ranges) {
    if (range.page < 0 || range.count <= 0 || range.count > pages || range.page > pages - range.count) {
      throw std::invalid_argument(std::to_string(range.count) + " pages from page " + std::to_string(range.page) +
                                  " are outside a buffer of " + std::to_string(pages) + " pages");
    }
    for (int64_t i = 0; i < range.count; ++i) numbers.push_back(range.page + i);
  }
  std::sort(numbers.begin(), numbers.end());
  const auto twice = std::adjacent_find(numbers.begin(), numbers.end());
  if (twice != numbers.end()) throw std::invalid_argument("page " + std::to_string(*twice) + " is named twice");
  return numbers;
}

Page PagedBuffer::Detach(int64_t number) {
  const auto entry = mapped_.find(number);
  Page page = std::move(entry->second.page);
  mapped_.erase(entry);
  return page;
}

void PagedBuffer::Map(const std::vector<PageRange>& ranges, bool zero) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<int64_t> numbers = Expand(ranges);
  for (const int64_t number : numbers) {
    if (mapped_.count(number) != 0) throw std::invalid_argument("page " + std::to_string(number) + " is mapped already");
  }
  std::vector<Page> pages = pool_->Take(static_cast<int64_t>(numbers.size()));
  size_t done = 0;
  try {
    for (; done < numbers.size(); ++done) {
      Mapping mapping(reservation_, numbers[done] * pool_->page_bytes(), pages.back());
      mapped_.try_emplace(numbers[done], MappedPage{std::move(pages.back()), std::move(mapping)});
      pages.pop_back();
    }
    for (const PageRange& range : ranges) {
      // One call a range: the cost is in the call, not in the bytes.
      if (zero) {
        pool_->memory()->Zero(address() + range.page * pool_->page_bytes(), range.count * pool_->page_bytes());
      }
    }
  } catch (...) {
    for (size_t i = 0; i < done; ++i) pages.push_back(Detach(numbers[i]));
    pool_->Give(std::move(pages));
    throw;
  }
}

void PagedBuffer::Unmap(const std::vector<PageRange>& ranges) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<int64_t> numbers = Expand(ranges);
  for (const int64_t number : numbers) {
    if (mapped_.count(number) == 0) throw std::invalid_argument("page " + std::to_string(number) + " is not mapped");
  }
  size_t done = 0;
  try {
    for (; done < numbers.size(); ++done) mapped_.find(numbers[done])->second.mapping.Unmap();
  } catch (...) {
    for (size_t i = 0; i < done; ++i) MapAgain(numbers[i], Detach(numbers[i]));
    throw;
  }
  std::vector<Page> pages;
  for (const int64_t number : numbers) pages.push_back(Detach(number));
  pool_->Give(std::move(pages));
}

void PagedBuffer::MapAgain(int64_t number, Page page) noexcept {
  try {
    Mapping mapping(reservation_, number * pool_->page_bytes(), page);
    mapped_.try_emplace(number, MappedPage{std::move(page), std::move(mapping)});
  } catch (const std::exception& error) {
    // Nothing is lost but the place: the page goes back to the pool.
    std::fprintf(stderr, "jax_vattention: page %lld could not be mapped again: %s\n", static_cast<long long>(number),
                 error.what());
    std::vector<Page> pages;
    pages.push_back(std::move(page));
    pool_->Give(std::move(pages));
  }
}

int64_t PagedBuffer::mapped_pages() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(mapped_.size());
}

}  // namespace jax_vattention
