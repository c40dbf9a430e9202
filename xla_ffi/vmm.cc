#include "vmm.h"

#include <chrono>
#include <cstdio>
#include <thread>
#include <utility>

namespace jax_vattention {

void Memory::InjectFailure(int64_t calls, bool out_of_memory, int64_t times) {
  std::lock_guard<std::mutex> lock(mutex_);
  calls_until_failure_ = calls;
  failures_ahead_ = times;
  fail_out_of_memory_ = out_of_memory;
}

int64_t Memory::injected() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return injected_;
}

std::map<std::string, int64_t> Memory::calls() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return {calls_.begin(), calls_.end()};
}

void Memory::CountCall(const char* call, const std::string& state) {
  if (const int64_t delay = delay_microseconds_) std::this_thread::sleep_for(std::chrono::microseconds(delay));
  bool out_of_memory;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++calls_[call];
    if (failures_ahead_ == 0) return;
    if (calls_until_failure_ > 0) {
      --calls_until_failure_;
      return;
    }
    --failures_ahead_;
    ++injected_;
    out_of_memory = fail_out_of_memory_;
  }
  Refuse(call, state + " (an injected failure)", out_of_memory);
}

void Memory::CountCleanUp(const char* call, const std::string& state) noexcept {
  try {
    CountCall(call, state);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "jax_vattention: %s\n", error.what());
  }
}

Page::Page(std::shared_ptr<Memory> memory, size_t bytes)
    : memory_(std::move(memory)), bytes_(bytes), handle_(memory_->CreatePage(bytes)) {}

Page::~Page() {
  if (memory_) memory_->ReleasePage(handle_, bytes_);
}

Page::Page(Page&& other) noexcept
    : memory_(std::move(other.memory_)), bytes_(other.bytes_), handle_(other.handle_) {}

Reservation::Reservation(std::shared_ptr<Memory> memory, size_t bytes)
    : memory_(std::move(memory)), bytes_(bytes), address_(memory_->Reserve(bytes)) {}

Reservation::~Reservation() { memory_->ReleaseReservation(address_, bytes_); }

Mapping::Mapping(Reservation& reservation, size_t offset, const Page& page)
    : memory_(&reservation.memory()), address_(reservation.address() + offset), bytes_(page.bytes()) {
  memory_->Map(address_, bytes_, page.handle());
}

Mapping::Mapping(Mapping&& other) noexcept
    : memory_(std::exchange(other.memory_, nullptr)), address_(other.address_), bytes_(other.bytes_) {}

Mapping::~Mapping() {
  // Twice: behind a mapping that stays, neither its page nor its addresses can be given back.
  for (const char* outcome : {"will be tried again", "was left behind"}) {
    if (memory_ == nullptr) return;
    try {
      Unmap();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "jax_vattention: a mapping %s: %s\n", outcome, error.what());
    }
  }
}

void Mapping::Unmap() {
  memory_->Unmap(address_, bytes_);
  memory_ = nullptr;
}

}  // namespace jax_vattention
