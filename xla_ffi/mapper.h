// A background thread that maps, unmaps and zeroes pages, so that nobody waits for the driver who need not.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

namespace jax_vattention {

// Runs jobs one after the other, in the order in which they were submitted. Never takes the interpreter lock. More
// threads would not help: the driver has a lock of its own.
class Mapper {
 public:
  // Tickets count up from 1: a job is done when all with its number or less are.
  using Ticket = int64_t;
  using Job = std::function<void()>;

  struct Counts {
    int64_t submitted;
    int64_t completed;
    int64_t failed;
    double busy_seconds;
  };

  Mapper();
  // Runs what is queued, then stops the thread.
  ~Mapper();
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;

  Ticket Submit(Job job);
  // The last ticket whose job is done, whether it failed or not.
  Ticket completed() const { return completed_; }
  // Waits for a job. Throws std::invalid_argument for a ticket that was never given out.
  void Wait(Ticket ticket);
  // Throws what a job that is done threw, once; returns if it did not fail.
  void ThrowIfFailed(Ticket ticket);
  Counts counts() const;

 private:
  void Run();

  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable progress_;
  std::deque<Job> queue_;
  std::map<Ticket, std::exception_ptr> failures_;
  Ticket submitted_ = 0;
  std::atomic<Ticket> completed_{0};  // changed under the mutex; read without it
  int64_t failed_ = 0;
  double busy_seconds_ = 0;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace jax_vattention
