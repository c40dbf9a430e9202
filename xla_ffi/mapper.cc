#include "mapper.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>

namespace jax_vattention {

Mapper::Mapper() : thread_([this] { Run(); }) {}

Mapper::~Mapper() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_.notify_one();
  thread_.join();
}

Mapper::Ticket Mapper::Submit(Job job) {
  Ticket ticket;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(job));
    ticket = ++submitted_;
  }
  work_.notify_one();
  return ticket;
}

void Mapper::Wait(Ticket ticket) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (ticket > submitted_) {
    throw std::invalid_argument("ticket " + std::to_string(ticket) + " was never given out: the last is " +
                                std::to_string(submitted_));
  }
  progress_.wait(lock, [&] { return completed_ >= ticket; });
}

void Mapper::ThrowIfFailed(Ticket ticket) {
  std::exception_ptr failure;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto entry = failures_.find(ticket);
    if (entry == failures_.end()) return;
    failure = std::move(entry->second);
    failures_.erase(entry);
  }
  std::rethrow_exception(failure);
}

Mapper::Counts Mapper::counts() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return {submitted_, completed_, failed_, busy_seconds_};
}

void Mapper::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Job job = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    std::exception_ptr failure;
    const auto start = std::chrono::steady_clock::now();
    try {
      job();
    } catch (...) {
      failure = std::current_exception();
    }
    // What the job holds goes before anyone hears that it is done.
    job = nullptr;
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    lock.lock();
    ++completed_;
    busy_seconds_ += taken.count();
    if (failure) {
      ++failed_;
      failures_.emplace(completed_.load(), std::move(failure));
    }
    progress_.notify_all();
  }
}

}  // namespace jax_vattention
