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

std::vector<PagedBuffer::Place> PagedBuffer::Expand(const std::vector<PageRange>& ranges) const {
  const int64_t pages = static_cast<int64_t>(bytes() / pool_->page_bytes());
  std::vector<Place> places;
  for (const PageRange& range : ranges) {
    const bool positive = range.page >= 0 && range.count > 0 && range.span > 0;
    if (!positive || range.span > pages || range.count > pages / range.span ||
        range.page > pages - range.count * range.span) {
      throw std::invalid_argument(std::to_string(range.count) + " pages of " + std::to_string(range.span) +
                                  " smallest pages from page " + std::to_string(range.page) +
                                  " are outside a buffer of " + std::to_string(pages) + " pages");
    }
    for (int64_t i = 0; i < range.count; ++i) places.push_back({range.page + i * range.span, range.span});
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.page < b.page; });
  for (size_t i = 1; i < places.size(); ++i) {
    if (places[i - 1].page + places[i - 1].span > places[i].page) {
      throw std::invalid_argument("page " + std::to_string(places[i].page) + " is named twice");
    }
  }
  return places;
}

bool PagedBuffer::Overlaps(const Place& place) const {
  const auto after = mapped_.lower_bound(place.page);
  if (after != mapped_.end() && after->first < place.page + place.span) return true;
  if (after == mapped_.begin()) return false;
  const auto before = std::prev(after);
  return before->first + static_cast<int64_t>(before->second.page.bytes() / pool_->page_bytes()) > place.page;
}

bool PagedBuffer::Covered(int64_t page, int64_t count) const {
  const int64_t end = page + count;
  while (page < end) {
    auto entry = mapped_.upper_bound(page);
    if (entry == mapped_.begin()) return false;
    --entry;
    const int64_t next = entry->first + static_cast<int64_t>(entry->second.page.bytes() / pool_->page_bytes());
    if (next <= page) return false;
    page = next;
  }
  return true;
}

std::vector<Memory::Range> PagedBuffer::Addresses(const std::vector<PageRange>& ranges) const {
  std::vector<Memory::Range> addresses;
  for (const PageRange& range : ranges) {
    addresses.push_back({address() + range.page * pool_->page_bytes(), range.count * range.span * pool_->page_bytes()});
  }
  return addresses;
}

Page PagedBuffer::Detach(int64_t number) {
  const auto entry = mapped_.find(number);
  Page page = std::move(entry->second.page);
  mapped_.erase(entry);
  mapped_pages_ -= static_cast<int64_t>(page.bytes() / pool_->page_bytes());
  return page;
}

void PagedBuffer::Map(const std::vector<PageRange>& ranges, bool zero) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<Place> places = Expand(ranges);
  std::vector<size_t> sizes;
  for (const Place& place : places) {
    if (Overlaps(place)) throw std::invalid_argument("page " + std::to_string(place.page) + " is mapped already");
    sizes.push_back(place.span * pool_->page_bytes());
  }
  std::vector<Page> pages = pool_->Take(sizes);
  size_t done = 0;
  try {
    for (; done < places.size(); ++done) {
      // A reference until it is mapped: if that fails the page is still among those to give back.
      Mapping mapping(reservation_, places[done].page * pool_->page_bytes(), pages[done]);
      mapped_.try_emplace(places[done].page, MappedPage{std::move(pages[done]), std::move(mapping)});
      mapped_pages_ += places[done].span;
    }
    if (zero) pool_->memory()->Zero(Addresses(ranges));
  } catch (...) {
    std::vector<Page> unused;
    for (size_t i = 0; i < places.size(); ++i) unused.push_back(i < done ? Detach(places[i].page) : std::move(pages[i]));
    pool_->Give(std::move(unused));
    throw;
  }
}

void PagedBuffer::Unmap(const std::vector<PageRange>& ranges) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<Place> places = Expand(ranges);
  for (const Place& place : places) {
    const auto entry = mapped_.find(place.page);
    if (entry == mapped_.end() || entry->second.page.bytes() != place.span * pool_->page_bytes()) {
      throw std::invalid_argument("page " + std::to_string(place.page) + " is not mapped, or in another size");
    }
  }
  size_t done = 0;
  try {
    for (; done < places.size(); ++done) mapped_.find(places[done].page)->second.mapping.Unmap();
  } catch (...) {
    for (size_t i = 0; i < done; ++i) MapAgain(places[i].page, Detach(places[i].page));
    throw;
  }
  std::vector<Page> pages;
  for (const Place& place : places) pages.push_back(Detach(place.page));
  pool_->Give(std::move(pages));
}

void PagedBuffer::Zero(const std::vector<PageRange>& ranges) {
  std::lock_guard<std::mutex> lock(mutex_);
  Expand(ranges);  // checks
  for (const PageRange& range : ranges) {
    if (!Covered(range.page, range.count * range.span)) {
      throw std::invalid_argument("page " + std::to_string(range.page) + " or one behind it is not mapped");
    }
  }
  pool_->memory()->Zero(Addresses(ranges));
}

void PagedBuffer::MapAgain(int64_t number, Page page) noexcept {
  try {
    Mapping mapping(reservation_, number * pool_->page_bytes(), page);
    mapped_pages_ += static_cast<int64_t>(page.bytes() / pool_->page_bytes());
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

}  // namespace jax_vattention
