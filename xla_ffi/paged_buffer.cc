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
  while (!mapped_.empty()) pages.push_back(Detach(mapped_.begin()));
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

PagedBuffer::Table::iterator PagedBuffer::Overlapping(const Place& place) {
  auto entry = mapped_.lower_bound(place.page);
  if (entry != mapped_.end() && entry->first < place.page + place.span) return entry;
  if (entry == mapped_.begin()) return mapped_.end();
  --entry;
  return entry->first + SpanOf(entry->second.page) > place.page ? entry : mapped_.end();
}

void PagedBuffer::CheckFree(const std::vector<Place>& places) {
  for (const Place& place : places) {
    for (auto entry = Overlapping(place); entry != mapped_.end(); entry = Overlapping(place)) {
      if (entry->second.wanted) {
        throw std::invalid_argument("page " + std::to_string(place.page) + " is mapped already");
      }
      Mend(entry);
    }
  }
}

void PagedBuffer::CheckMapped(const std::vector<Place>& places) const {
  for (const Place& place : places) {
    const auto entry = mapped_.find(place.page);
    if (entry == mapped_.end() || !entry->second.wanted || SpanOf(entry->second.page) != place.span) {
      throw std::invalid_argument("page " + std::to_string(place.page) + " is not mapped, or in another size");
    }
  }
}

bool PagedBuffer::Covered(const PageRange& range) const {
  const int64_t end = range.page + range.count * range.span;
  for (int64_t page = range.page; page < end;) {
    auto entry = mapped_.upper_bound(page);
    if (entry == mapped_.begin()) return false;
    --entry;
    const int64_t next = entry->first + SpanOf(entry->second.page);
    if (next <= page || !entry->second.wanted || !entry->second.mapping) return false;
    page = next;
  }
  return true;
}

std::vector<Memory::Range> PagedBuffer::Addresses(const std::vector<PageRange>& ranges) const {
  std::vector<Memory::Range> addresses;
  for (const PageRange& range : ranges) {
    addresses.push_back({address() + OffsetOf(range.page), OffsetOf(range.count * range.span)});
  }
  return addresses;
}

std::vector<PagedBuffer::Share> PagedBuffer::Begin(const Work& work) {
  std::map<PagedBuffer*, std::vector<PageRange>> merged;
  for (const auto& [buffer, ranges] : work) {
    std::vector<PageRange>& all = merged[buffer.get()];
    all.insert(all.end(), ranges.begin(), ranges.end());
  }
  std::vector<Share> shares;
  for (auto& [buffer, ranges] : merged) {
    std::vector<Place> places = buffer->Expand(ranges);
    shares.push_back({buffer, std::unique_lock(buffer->mutex_), std::move(ranges), std::move(places), {}});
    buffer->MendAll();
  }
  return shares;
}

void PagedBuffer::Map(const Work& work, bool zero) {
  std::vector<Share> shares = Begin(work);
  for (Share& share : shares) share.buffer->CheckFree(share.places);
  try {
    for (Share& share : shares) share.buffer->TakePages(share);
    for (Share& share : shares) share.buffer->MapPages(share);
    if (zero) {
      for (Share& share : shares) share.buffer->pool_->memory()->Zero(share.buffer->Addresses(share.ranges));
    }
  } catch (...) {
    for (Share& share : shares) share.buffer->UndoMap(share);
    throw;
  }
}

void PagedBuffer::Unmap(const Work& work) {
  std::vector<Share> shares = Begin(work);
  for (Share& share : shares) share.buffer->CheckMapped(share.places);
  try {
    for (Share& share : shares) share.buffer->UnmapPages(share);
  } catch (...) {
    for (Share& share : shares) share.buffer->UndoUnmap(share);
    throw;
  }
  // Only now: nobody else can take a page that may have to go back to its place.
  for (Share& share : shares) share.buffer->GivePages(share);
}

void PagedBuffer::Zero(const Work& work) {
  std::vector<Share> shares = Begin(work);
  for (Share& share : shares) {
    for (const PageRange& range : share.ranges) {
      if (share.buffer->Covered(range)) continue;
      throw std::invalid_argument("page " + std::to_string(range.page) + " or one behind it is not mapped");
    }
  }
  for (Share& share : shares) share.buffer->pool_->memory()->Zero(share.buffer->Addresses(share.ranges));
}

void PagedBuffer::TakePages(Share& share) {
  std::vector<size_t> sizes;
  for (const Place& place : share.places) sizes.push_back(OffsetOf(place.span));
  share.pages = pool_->Take(sizes);
}

void PagedBuffer::MapPages(Share& share) {
  for (; share.done < share.places.size(); ++share.done) {
    const Place& place = share.places[share.done];
    Page& page = share.pages[share.done];
    // A reference until it is mapped: if that fails the page is still among those to give back.
    Mapping mapping(reservation_, OffsetOf(place.page), page);
    mapped_.try_emplace(place.page, MappedPage{std::move(page), std::move(mapping), true});
    mapped_pages_ += place.span;
  }
}

void PagedBuffer::UndoMap(Share& share) noexcept {
  for (size_t i = 0; i < share.done; ++i) {
    const auto entry = mapped_.find(share.places[i].page);
    entry->second.wanted = false;
    mapped_pages_ -= share.places[i].span;
    try {
      Mend(entry);
    } catch (const std::exception& error) {
      broken_ = true;
      std::fprintf(stderr, "jax_vattention: undoing a mapping failed, and will be tried again: %s\n", error.what());
    }
  }
  std::vector<Page> unused;  // the others were moved into the table
  for (size_t i = share.done; i < share.pages.size(); ++i) unused.push_back(std::move(share.pages[i]));
  pool_->Give(std::move(unused));
}

void PagedBuffer::UnmapPages(Share& share) {
  for (; share.done < share.places.size(); ++share.done) {
    std::optional<Mapping>& mapping = mapped_.find(share.places[share.done].page)->second.mapping;
    if (!mapping) continue;  // broken
    mapping->Unmap();
    mapping.reset();
  }
}

void PagedBuffer::UndoUnmap(Share& share) noexcept {
  for (size_t i = 0; i < share.done; ++i) {
    const auto entry = mapped_.find(share.places[i].page);
    try {
      entry->second.mapping.emplace(reservation_, OffsetOf(entry->first), entry->second.page);
    } catch (const std::exception& error) {
      broken_ = true;
      std::fprintf(stderr, "jax_vattention: page %lld could not be mapped again, which will be tried again: %s\n",
                   static_cast<long long>(entry->first), error.what());
    }
  }
}

void PagedBuffer::GivePages(Share& share) {
  std::vector<Page> pages;
  for (const Place& place : share.places) {
    pages.push_back(Detach(mapped_.find(place.page)));
    mapped_pages_ -= place.span;
  }
  pool_->Give(std::move(pages));
}

Page PagedBuffer::Detach(Table::iterator entry) {
  Page page = std::move(entry->second.page);
  mapped_.erase(entry);
  return page;
}

void PagedBuffer::Mend(Table::iterator entry) {
  MappedPage& mapped = entry->second;
  if (mapped.wanted) {
    mapped.mapping.emplace(reservation_, OffsetOf(entry->first), mapped.page);
  } else {
    mapped.mapping->Unmap();
    std::vector<Page> pages;
    pages.push_back(Detach(entry));
    pool_->Give(std::move(pages));
  }
}

void PagedBuffer::MendAll() noexcept {
  if (!broken_) return;
  broken_ = false;
  for (auto next = mapped_.begin(); next != mapped_.end();) {
    const auto entry = next++;
    if (entry->second.wanted == entry->second.mapping.has_value()) continue;
    try {
      Mend(entry);
    } catch (const std::exception&) {
      broken_ = true;  // logged when it broke. Work on the same place throws what stands in its way.
    }
  }
}

}  // namespace jax_vattention
