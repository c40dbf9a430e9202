// Threads map, unmap and zero in the same buffers and out of one pool, directly and through mappers, while calls of the
// backend fail. Whatever happens, every operation is all or nothing, nobody's bytes change under them, and nothing is
// left at the end. Prints one line of counts; ends with an error at the first thing that does not hold.
//
//   stress [iterations of each thread] [threads] [seed]
//
// tests/test_sanitizers.py builds it with sanitizers and runs it.

#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "mapper.h"
#include "page_pool.h"
#include "paged_buffer.h"
#include "vmm.h"

namespace jax_vattention {
namespace {

const size_t kPageBytes = sysconf(_SC_PAGESIZE);  // the smallest
constexpr std::array<int64_t, 3> kSpans = {1, 2, 8};  // page sizes, in smallest pages
constexpr int64_t kCellPages = 8;
constexpr int64_t kAreasPerClient = 3;
constexpr int64_t kBuffers = 4;
constexpr int64_t kCellsPerArea = 2 * kBuffers;  // two in each buffer

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "stress: %s\n", what.c_str());
  std::_Exit(1);  // other threads are at work: nothing can be taken down in order
}

void Require(bool holds, const char* what) {
  if (!holds) Fail(what);
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t Below(int64_t end) { return std::uniform_int_distribution<int64_t>(0, end - 1)(engine_); }
  bool OneIn(int64_t n) { return Below(n) == 0; }
  template <typename Items>
  void Shuffle(Items& items) {
    std::shuffle(items.begin(), items.end(), engine_);
  }

 private:
  std::mt19937_64 engine_;
};

struct Counts {
  std::atomic<int64_t> done{0};
  std::atomic<int64_t> failed{0};
  std::atomic<int64_t> out_of_pages{0};
  std::atomic<int64_t> refused{0};
};

// What all threads work on. The pool holds a third of what the buffers could: pages change owners and sizes.
struct Shared {
  explicit Shared(int64_t areas) {
    const size_t buffer_bytes = areas * (kCellsPerArea / kBuffers) * kCellPages * kPageBytes;
    std::vector<size_t> sizes;
    for (const int64_t span : kSpans) sizes.push_back(span * kPageBytes);
    pool = std::make_shared<PagePool>(memory, sizes, kBuffers * buffer_bytes / 3);
    for (int64_t i = 0; i < kBuffers; ++i) buffers.push_back(std::make_shared<PagedBuffer>(pool, buffer_bytes));
  }

  const std::shared_ptr<Memory> memory = OpenHostMemory(/*strict=*/true);
  std::shared_ptr<PagePool> pool;
  std::vector<std::shared_ptr<PagedBuffer>> buffers;
  std::array<Mapper, 2> mappers;
  Counts counts;
};

// A part of a buffer that one client maps, with pages of one size, and unmaps as a whole.
struct Cell {
  std::shared_ptr<PagedBuffer> buffer;
  PageRange range;        // its count is 0 where nothing is mapped
  uint64_t mark = 0;      // in every word
  bool doubtful = false;  // an unmap failed and undoing that may have failed too: perhaps it cannot be read for now

  bool mapped() const { return range.count > 0; }
  uint64_t* begin() const { return reinterpret_cast<uint64_t*>(buffer->address() + range.page * kPageBytes); }
  uint64_t* end() const { return begin() + range.count * range.span * kPageBytes / sizeof(uint64_t); }
};

// What a cell holds, or nothing where a part of it is not mapped: the kernel looks, and does not fault.
std::optional<std::vector<uint64_t>> Peek(const Cell& cell) {
  std::vector<uint64_t> words(cell.end() - cell.begin());
  const size_t bytes = words.size() * sizeof(uint64_t);
  const iovec to = {words.data(), bytes};
  const iovec from = {cell.begin(), bytes};
  const ssize_t copied = process_vm_readv(getpid(), &to, 1, &from, 1, 0);
  if (copied < 0 && errno != EFAULT) Fail(std::string("process_vm_readv: ") + std::strerror(errno));
  return copied == static_cast<ssize_t>(bytes) ? std::optional(words) : std::nullopt;
}

void CheckMark(const Cell& cell) {
  const auto is_mark = [&](uint64_t word) { return word == cell.mark; };
  if (!cell.doubtful) {
    Require(std::all_of(cell.begin(), cell.end(), is_mark), "somebody wrote on a mapped page");
  } else if (const auto words = Peek(cell)) {
    Require(std::all_of(words->begin(), words->end(), is_mark), "an unmap that failed changed what a page holds");
  }
}

void CheckZeros(const Cell& cell) {
  Require(std::all_of(cell.begin(), cell.end(), [](uint64_t word) { return word == 0; }), "a zeroed page is not zero");
}

// Whether an operation happened; it may have failed as the backend or the pool does, and in no other way.
template <typename Outcome>
bool Happened(Counts& counts, Outcome outcome) {
  try {
    outcome();
    ++counts.done;
    return true;
  } catch (const DriverError&) {
    ++counts.failed;
  } catch (const OutOfPages&) {
    ++counts.out_of_pages;
  }
  return false;
}

enum class Verb { kMap, kMapZeroed, kUnmap, kZero };

void Perform(Verb verb, const PagedBuffer::Work& work) {
  switch (verb) {
    case Verb::kMap:
    case Verb::kMapZeroed:
      return PagedBuffer::Map(work, verb == Verb::kMapZeroed);
    case Verb::kUnmap:
      return PagedBuffer::Unmap(work);
    case Verb::kZero:
      return PagedBuffer::Zero(work);
  }
}

// Cells in all buffers with at most one operation under way.
class Area {
 public:
  Area(Shared& shared, int64_t number) : shared_(shared), next_mark_((number + 1) << 32) {
    for (int64_t i = 0; i < kCellsPerArea; ++i) {
      const int64_t page = (number * (kCellsPerArea / kBuffers) + i / kBuffers) * kCellPages;
      cells_.push_back({shared.buffers[i % kBuffers], {page, 0}});
    }
  }

  // Begins an operation, or sees how the last one went.
  void Advance(Random& random) {
    if (pending_) {
      Settle(random);
    } else if (random.OneIn(16)) {
      Misuse(random);
    } else {
      const Verb verb = std::array{Verb::kMap, Verb::kMapZeroed, Verb::kUnmap, Verb::kZero}[random.Below(4)];
      Start(verb, random);
    }
  }

  void Settle(Random& random) {
    if (!pending_) return;
    Mapper& mapper = *pending_->mapper;
    const Mapper::Ticket ticket = pending_->ticket;
    if (random.OneIn(2)) {
      mapper.Wait(ticket);
    } else {
      while (mapper.completed() < ticket) std::this_thread::yield();
    }
    const bool happened = Happened(shared_.counts, [&] { mapper.ThrowIfFailed(ticket); });
    mapper.ThrowIfFailed(ticket);  // a failure is thrown once
    Finish(*pending_, happened);
    pending_.reset();
  }

  // At the end, when no call fails any more.
  void UnmapAll() {
    Operation all{Verb::kUnmap, {}};
    for (Cell& cell : cells_) {
      if (cell.mapped()) all.cells.push_back(&cell);
    }
    Perform(Verb::kUnmap, WorkOf(all.cells));
    Finish(all, true);
  }

  // The smallest pages that are mapped, all of them with their marks.
  int64_t CheckAll() const {
    int64_t pages = 0;
    for (const Cell& cell : cells_) {
      if (!cell.mapped()) continue;
      Require(Peek(cell).has_value(), "a page was not mapped again after its unmap had failed");
      CheckMark(cell);
      pages += cell.range.count * cell.range.span;
    }
    return pages;
  }

 private:
  struct Operation {
    Verb verb;
    std::vector<Cell*> cells;
    Mapper* mapper = nullptr;
    Mapper::Ticket ticket = 0;
  };

  static PagedBuffer::Work WorkOf(const std::vector<Cell*>& cells) {
    PagedBuffer::Work work;
    for (const Cell* cell : cells) work.push_back({cell->buffer, {cell->range}});
    return work;
  }

  // Up to `most` cells that fit, in any order.
  template <typename Fits>
  std::vector<Cell*> Choose(Random& random, int64_t most, Fits fits) {
    std::vector<Cell*> chosen;
    for (Cell& cell : cells_) {
      if (fits(cell)) chosen.push_back(&cell);
    }
    random.Shuffle(chosen);
    if (static_cast<int64_t>(chosen.size()) > most) chosen.resize(most);
    return chosen;
  }

  void Start(Verb verb, Random& random) {
    const bool maps = verb == Verb::kMap || verb == Verb::kMapZeroed;
    Operation operation{verb, Choose(random, 1 + random.Below(5), [&](const Cell& cell) {
                          // What is wanted but could not be mapped again cannot be zeroed, and says so.
                          return cell.mapped() != maps && !(verb == Verb::kZero && cell.doubtful);
                        })};
    for (Cell* cell : operation.cells) {
      if (!maps) {
        CheckMark(*cell);
        continue;
      }
      cell->range.span = kSpans[random.Below(kSpans.size())];
      cell->range.count = 1 + random.Below(kCellPages / cell->range.span);
    }
    const PagedBuffer::Work work = WorkOf(operation.cells);
    if (random.OneIn(2)) {
      Finish(operation, Happened(shared_.counts, [&] { Perform(verb, work); }));
    } else {
      operation.mapper = &shared_.mappers[random.Below(shared_.mappers.size())];
      operation.ticket = operation.mapper->Submit([verb, work] { Perform(verb, work); });
      pending_ = std::move(operation);
    }
  }

  void Finish(const Operation& operation, bool happened) {
    for (Cell* cell : operation.cells) {
      switch (operation.verb) {
        case Verb::kMap:
        case Verb::kMapZeroed:
          if (!happened) {
            cell->range.count = 0;
            break;
          }
          if (operation.verb == Verb::kMapZeroed) CheckZeros(*cell);
          Write(*cell);
          break;
        case Verb::kUnmap:
          cell->doubtful = !happened;
          if (happened) {
            cell->range.count = 0;
          } else {
            CheckMark(*cell);
          }
          break;
        case Verb::kZero:
          if (happened) CheckZeros(*cell);
          Write(*cell);
          break;
      }
    }
  }

  void Write(Cell& cell) {
    cell.mark = ++next_mark_;
    std::fill(cell.begin(), cell.end(), cell.mark);
  }

  // A mapped cell and an empty one can be neither mapped nor unmapped together. What comes after shows that nothing
  // changed.
  void Misuse(Random& random) {
    std::vector<Cell*> cells = Choose(random, 1, [](const Cell& cell) { return cell.mapped(); });
    for (Cell* cell : Choose(random, 1, [](const Cell& cell) { return !cell.mapped(); })) cells.push_back(cell);
    if (cells.size() != 2) return;
    PagedBuffer::Work work = WorkOf(cells);
    work.back().second.front().count = 1;
    for (const Verb verb : {Verb::kMap, Verb::kUnmap}) {
      try {
        Happened(shared_.counts, [&] { Perform(verb, work); Fail("what cannot be was done"); });
      } catch (const std::invalid_argument&) {
        ++shared_.counts.refused;
      }
    }
  }

  Shared& shared_;
  uint64_t next_mark_;
  std::vector<Cell> cells_;
  std::optional<Operation> pending_;
};

// A mapper, a buffer and perhaps a pool of one's own, which go while jobs are queued that hold them.
void Depart(Shared& shared, bool own_pool) {
  constexpr int64_t kJobs = kCellPages;
  std::atomic<int64_t> ran{0};
  std::weak_ptr<PagedBuffer> alive;
  Happened(shared.counts, [&] {
    Mapper mapper;
    auto pool = own_pool ? std::make_shared<PagePool>(shared.memory, std::vector{kPageBytes}, kCellPages * kPageBytes)
                         : shared.pool;
    auto buffer = std::make_shared<PagedBuffer>(std::move(pool), kCellPages * kPageBytes);
    alive = buffer;
    for (int64_t i = 0; i < kJobs; ++i) {
      // Every second one unmaps the page before: perhaps it is not there, which nobody will hear of.
      mapper.Submit([&ran, work = PagedBuffer::Work{{buffer, {{i / 2, 1}}}}, verb = i % 2 ? Verb::kUnmap : Verb::kMap] {
        ++ran;
        Perform(verb, work);
      });
    }
    buffer.reset();
  });
  Require(ran == kJobs || ran == 0, "a mapper went before its work was done");
  Require(alive.expired(), "a buffer outlived the last job that held it");
}

void RunClient(Shared& shared, std::deque<Area>& areas, Random random, int64_t iterations) {
  try {
    for (int64_t i = 0; i < iterations; ++i) {
      areas[random.Below(areas.size())].Advance(random);
      if (random.OneIn(64)) Depart(shared, random.OneIn(2));
    }
    for (Area& area : areas) area.Settle(random);
  } catch (const std::exception& error) {
    Fail(std::string("an operation failed that should not: ") + error.what());
  }
}

// Reads all counts while they change.
void Watch(const Shared& shared, const std::atomic<bool>& over) {
  const PagePool& pool = *shared.pool;
  const auto pages = [&](size_t bytes) { return static_cast<int64_t>(bytes / kPageBytes); };
  std::array<int64_t, 2> last{};
  while (!over) {
    Require(pool.free_bytes() <= pool.total_bytes(), "more bytes are free than there are");
    Require(pool.created_bytes() <= pool.total_bytes(), "more pages exist than the budget allows");
    for (const PagePool::Count& count : pool.counts()) {
      Require(count.created >= 0 && count.idle >= 0, "a count of pages is negative");
    }
    for (const auto& buffer : shared.buffers) {
      const int64_t mapped = buffer->mapped_pages();
      Require(mapped >= 0 && mapped <= pages(pool.total_bytes()), "more pages are mapped than there are");
    }
    for (size_t i = 0; i < last.size(); ++i) {
      const int64_t completed = shared.mappers[i].completed();
      const Mapper::Counts counts = shared.mappers[i].counts();
      Require(last[i] <= completed && completed <= counts.completed, "a mapper's tickets went backwards");
      Require(counts.completed <= counts.submitted && counts.failed <= counts.completed, "a mapper miscounts");
      last[i] = completed;
    }
    for (const auto& [call, times] : shared.memory->calls()) Require(times > 0, "a call was counted that was not made");
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

// Lets a few calls in a row fail, again and again: operations, and sometimes the undoing of what they had done.
void Trouble(Memory& memory, Random random, const std::atomic<bool>& over) {
  while (!over) {
    memory.InjectFailure(random.Below(50), random.OneIn(2), 1 + random.Below(3));
    memory.SetDelay(random.OneIn(8) ? 20 : 0);
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  memory.InjectFailure(0, false, 0);
  memory.SetDelay(0);
}

// What the kernel holds for pages of this process.
int64_t BytesInMemory() {
  int64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;  // the listing's own
    if (std::filesystem::read_symlink(entry, gone).string().find("memfd:jax_vattention") == std::string::npos) continue;
    struct stat status;
    if (stat(entry.path().c_str(), &status) == 0) bytes += status.st_blocks * 512;
  }
  return bytes;
}

// Nothing is under way, and no call fails.
void CheckCounts(const Shared& shared, int64_t expected_pages) {
  const PagePool& pool = *shared.pool;
  int64_t mapped = 0;
  for (const auto& buffer : shared.buffers) mapped += buffer->mapped_pages();
  size_t created = 0, idle = 0;
  for (const PagePool::Count& count : pool.counts()) {
    created += count.created * count.page_bytes;
    idle += count.idle * count.page_bytes;
  }
  Require(mapped == expected_pages, "a buffer miscounts its pages");
  Require(pool.free_bytes() + mapped * kPageBytes == pool.total_bytes(), "free + mapped != total");
  Require(created == pool.created_bytes() && created == idle + mapped * kPageBytes, "created != idle + mapped");
}

// Jobs in two mappers are the last to hold the buffers and the pool.
void DropAll(std::unique_ptr<Shared> shared) {
  const std::shared_ptr<Memory> memory = shared->memory;
  const std::weak_ptr<PagePool> pool = shared->pool;
  for (const Verb verb : {Verb::kMapZeroed, Verb::kZero}) {
    for (size_t i = 0; i < shared->buffers.size(); ++i) {
      const PagedBuffer::Work work = {{shared->buffers[i], {{0, 4}}}};
      shared->mappers[i % 2].Submit([verb, work] { Perform(verb, work); });
    }
  }
  memory->SetDelay(1000);
  shared->buffers.clear();
  shared->pool.reset();
  shared.reset();
  Require(pool.expired(), "the pool outlived all who held it");
  Require(BytesInMemory() == 0, "pages were left behind");
}

void Run(int64_t iterations, int64_t threads, uint64_t seed) {
  auto shared = std::make_unique<Shared>(threads * kAreasPerClient);
  std::vector<std::deque<Area>> clients(threads);
  for (int64_t i = 0; i < threads * kAreasPerClient; ++i) clients[i % threads].emplace_back(*shared, i);

  std::atomic<bool> over{false};
  std::thread watcher([&] { Watch(*shared, over); });
  std::thread trouble([&] { Trouble(*shared->memory, Random(seed), over); });
  std::vector<std::thread> running;
  for (int64_t i = 0; i < threads; ++i) {
    running.emplace_back([&, i] { RunClient(*shared, clients[i], Random(seed + 1 + i), iterations); });
  }
  for (std::thread& thread : running) thread.join();
  over = true;
  trouble.join();
  watcher.join();

  // The next work on a buffer, were it none, puts right what is broken.
  for (const auto& buffer : shared->buffers) PagedBuffer::Zero({{buffer, {}}});
  int64_t pages = 0;
  for (const auto& areas : clients) {
    for (const Area& area : areas) pages += area.CheckAll();
  }
  CheckCounts(*shared, pages);
  for (auto& areas : clients) {
    for (Area& area : areas) area.UnmapAll();
  }
  CheckCounts(*shared, 0);
  const Counts& counts = shared->counts;
  std::printf("done=%lld failed=%lld out_of_pages=%lld refused=%lld injected=%lld\n",
              static_cast<long long>(counts.done), static_cast<long long>(counts.failed),
              static_cast<long long>(counts.out_of_pages), static_cast<long long>(counts.refused),
              static_cast<long long>(shared->memory->injected()));
  clients.clear();
  DropAll(std::move(shared));
}

}  // namespace
}  // namespace jax_vattention

int main(int argc, char** argv) {
  const auto argument = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  try {
    jax_vattention::Run(/*iterations=*/argument(1, 2000), /*threads=*/argument(2, 4), /*seed=*/argument(3, 1));
  } catch (const std::exception& error) {
    jax_vattention::Fail(error.what());
  }
}
