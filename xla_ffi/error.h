// What a failed call of the memory backend looks like: the call, its code, and what it was working on.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace jax_vattention {

// Thrown for every failed driver or system call. `out_of_memory` tells a full device from a broken one.
class DriverError : public std::runtime_error {
 public:
  DriverError(std::string call, int64_t code, std::string name, std::string state, bool out_of_memory)
      : std::runtime_error(call + " failed with " + name + " (code " + std::to_string(code) + "): " + state),
        call(std::move(call)),
        name(std::move(name)),
        state(std::move(state)),
        code(code),
        out_of_memory(out_of_memory) {}

  const std::string call;
  const std::string name;
  const std::string state;
  const int64_t code;
  const bool out_of_memory;
};

// Thrown when CUDA is asked for on a machine whose driver cannot be loaded.
class DriverUnavailable : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace jax_vattention
