// The part of the DLPack 0.x ABI that an exported view needs. Source: dmlc/dlpack, the specification.
#pragma once

#include <cstdint>

namespace jax_vattention::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kFloat = 2, kBfloat = 4, kFloat8E4m3fn = 10 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* owner;
  void (*deleter)(ManagedTensor*);
};

}  // namespace jax_vattention::dlpack
