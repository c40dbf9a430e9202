// Host backend: a reservation is a range from mmap, physical memory is one memfd, a page is a piece of it.
// Sources: mmap(2), memfd_create(2), fallocate(2).

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "vmm.h"

namespace jax_vattention {
namespace {

const char* ErrnoName(int code) {
  const char* name = strerrorname_np(code);
  return name == nullptr ? "an unknown error" : name;
}

[[noreturn]] void Throw(const char* call, int code, const std::string& state) {
  const bool full = code == ENOMEM || code == ENOSPC;
  std::string hint = state;
  if (full && std::strcmp(call, "mmap") == 0) {
    hint += "; the process may be out of memory, of address space (ulimit -v), or of mappings (vm.max_map_count)";
  }
  throw DriverError(call, code, ErrnoName(code), hint, full);
}

void* At(uintptr_t address) { return reinterpret_cast<void*>(address); }

std::string Describe(uintptr_t address, size_t bytes) {
  char text[64];
  std::snprintf(text, sizeof(text), "%zu bytes at 0x%zx", bytes, static_cast<size_t>(address));
  return text;
}

class HostMemory final : public Memory {
 public:
  explicit HostMemory(bool strict) : strict_(strict), granularity_(sysconf(_SC_PAGESIZE)) {
    fd_ = memfd_create("jax_vattention", MFD_CLOEXEC);
    if (fd_ < 0) Throw("memfd_create", errno, "opening the file that stands for physical memory");
  }

  ~HostMemory() override { close(fd_); }

  const char* platform() const override { return "host"; }
  int ordinal() const override { return 0; }
  size_t granularity() const override { return granularity_; }

  MemoryInfo Info() override {
    struct sysinfo info;
    CountCall("sysinfo", "asking for free memory");
    if (sysinfo(&info) != 0) Throw("sysinfo", errno, "asking for free memory");
    const uint64_t unit = info.mem_unit;
    // Caches are given back under pressure; what the kernel calls available is in /proc/meminfo alone.
    uint64_t available = (info.freeram + info.bufferram) * unit;
    if (FILE* file = std::fopen("/proc/meminfo", "re")) {
      char line[128];
      unsigned long long kib;
      while (std::fgets(line, sizeof(line), file) != nullptr) {
        if (std::sscanf(line, "MemAvailable: %llu kB", &kib) == 1) available = uint64_t{kib} * 1024;
      }
      std::fclose(file);
    }
    return {available, info.totalram * unit};
  }

  Handle CreatePage(size_t bytes) override {
    const std::string state = "creating a page of " + std::to_string(bytes) + " bytes";
    const uint64_t offset = TakeOffset(bytes);
    try {
      CountCall("fallocate", state);
      // Takes the memory now, so that a full machine is an error here and no signal at the first write.
      if (fallocate(fd_, 0, offset, bytes) != 0) Throw("fallocate", errno, state);
    } catch (...) {
      GiveOffset(offset, bytes);
      throw;
    }
    return offset;
  }

  void ReleasePage(Handle page, size_t bytes) noexcept override {
    CountCleanUp("fallocate", "releasing a page of " + std::to_string(bytes) + " bytes");
    if (fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page, bytes) != 0) {
      std::fprintf(stderr, "jax_vattention: fallocate failed with %s: releasing a page\n", ErrnoName(errno));
    }
    GiveOffset(page, bytes);
  }

  uintptr_t Reserve(size_t bytes) override {
    const std::string state = "reserving " + std::to_string(bytes) + " bytes of virtual addresses";
    CountCall("mmap", state);
    void* address = mmap(nullptr, bytes, Protection(), kEmpty, -1, 0);
    if (address == MAP_FAILED) Throw("mmap", errno, state);
    return reinterpret_cast<uintptr_t>(address);
  }

  void ReleaseReservation(uintptr_t address, size_t bytes) noexcept override {
    CountCleanUp("munmap", "releasing " + Describe(address, bytes));
    if (munmap(At(address), bytes) != 0) {
      std::fprintf(stderr, "jax_vattention: munmap failed with %s: %s\n", ErrnoName(errno),
                   Describe(address, bytes).c_str());
    }
  }

  void Map(uintptr_t address, size_t bytes, Handle page) override {
    const std::string state = "mapping " + Describe(address, bytes);
    CountCall("mmap", state);
    if (mmap(At(address), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd_, page) == MAP_FAILED) {
      Throw("mmap", errno, state);
    }
  }

  void Unmap(uintptr_t address, size_t bytes) override {
    // One call both detaches the page and reserves the range again: no other thread can take it in between.
    const std::string state = "unmapping " + Describe(address, bytes);
    CountCall("mmap", state);
    if (mmap(At(address), bytes, Protection(), kEmpty | MAP_FIXED, -1, 0) == MAP_FAILED) {
      Throw("mmap", errno, state);
    }
  }

  void Zero(const std::vector<Range>& ranges) override {
    for (const Range& range : ranges) {
      CountCall("memset", "zeroing " + Describe(range.address, range.bytes));
      std::memset(At(range.address), 0, range.bytes);
    }
  }

 protected:
  void Refuse(const char* call, const std::string& state, bool out_of_memory) const override {
    Throw(call, out_of_memory ? ENOMEM : EIO, state);
  }

 private:
  static constexpr int kEmpty = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

  int Protection() const { return strict_ ? PROT_NONE : PROT_READ; }

  uint64_t TakeOffset(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<uint64_t>& free = free_offsets_[bytes];
    if (!free.empty()) {
      const uint64_t offset = free.back();
      free.pop_back();
      return offset;
    }
    const uint64_t offset = end_;
    end_ += bytes;
    return offset;
  }

  void GiveOffset(uint64_t offset, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_offsets_[bytes].push_back(offset);
  }

  const bool strict_;
  const size_t granularity_;
  int fd_;
  std::mutex mutex_;
  uint64_t end_ = 0;                                       // bytes of the file handed out so far
  std::map<size_t, std::vector<uint64_t>> free_offsets_;  // by page size
};

}  // namespace

std::shared_ptr<Memory> OpenHostMemory(bool strict) { return std::make_shared<HostMemory>(strict); }

}  // namespace jax_vattention
