// The Python face of the native core. jax_vattention/memory.py gives it types and documentation.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "handlers.h"
#include "mapper.h"
#include "paged_buffer.h"

namespace py = pybind11;

namespace jax_vattention {
namespace {

// A buffer with the number of views of it that are alive: tensors handed out and not yet deleted.
struct ExportedBuffer {
  ExportedBuffer(std::shared_ptr<PagePool> pool, size_t bytes) : buffer(std::move(pool), bytes) {}
  PagedBuffer buffer;
  const std::shared_ptr<std::atomic<int64_t>> views = std::make_shared<std::atomic<int64_t>>(0);
};

// Owns what a DLPack consumer points to. Its deleter needs no interpreter: XLA may call it on any thread, at any time.
struct Export {
  dlpack::ManagedTensor managed;
  std::vector<int64_t> shape;
  std::shared_ptr<ExportedBuffer> buffer;
};

void DeleteExport(dlpack::ManagedTensor* managed) {
  auto* exported = static_cast<Export*>(managed->owner);
  const std::shared_ptr<std::atomic<int64_t>> views = exported->buffer->views;
  delete exported;
  // Not before: whoever sees no view is the last owner, and frees the memory itself.
  --*views;
}

constexpr const char* kCapsule = "dltensor";

dlpack::Device DeviceOf(const PagedBuffer& buffer) {
  const Memory& memory = *buffer.pool().memory();
  if (std::string(memory.platform()) == "cuda") return {dlpack::kCuda, memory.ordinal()};
  return {dlpack::kCpu, 0};
}

dlpack::DataType DataTypeOf(const std::string& dtype) {
  if (dtype == "float32") return {dlpack::kFloat, 32, 1};
  if (dtype == "float16") return {dlpack::kFloat, 16, 1};
  if (dtype == "bfloat16") return {dlpack::kBfloat, 16, 1};
  if (dtype == "float8_e4m3fn") return {dlpack::kFloat8E4m3fn, 8, 1};
  throw std::invalid_argument("view: expected a dtype of float32, float16, bfloat16, float8_e4m3fn, got " + dtype);
}

// A tensor over part of a buffer, from `offset` bytes on.
py::capsule ToDlpack(const std::shared_ptr<ExportedBuffer>& buffer, std::vector<int64_t> shape,
                     const std::string& dtype, int64_t offset) {
  const dlpack::DataType type = DataTypeOf(dtype);
  int64_t bytes = type.bits / 8;
  for (const int64_t size : shape) bytes *= size;
  const int64_t whole = static_cast<int64_t>(buffer->buffer.bytes());
  if (offset < 0 || bytes > whole || offset > whole - bytes) {
    throw std::invalid_argument("view: expected a shape and an offset within " + std::to_string(whole) +
                                " bytes, got a shape of " + std::to_string(bytes) + " bytes at offset " +
                                std::to_string(offset));
  }
  auto exported = std::make_unique<Export>();
  exported->shape = std::move(shape);
  exported->buffer = buffer;
  dlpack::Tensor& tensor = exported->managed.tensor;
  tensor.data = reinterpret_cast<void*>(buffer->buffer.address() + offset);
  tensor.device = DeviceOf(buffer->buffer);
  tensor.ndim = static_cast<int32_t>(exported->shape.size());
  tensor.dtype = type;
  tensor.shape = exported->shape.data();
  tensor.strides = nullptr;
  tensor.byte_offset = 0;
  exported->managed.owner = exported.get();
  exported->managed.deleter = DeleteExport;
  py::capsule capsule(&exported->managed, kCapsule, [](PyObject* object) {
    // A consumer renames the capsule and deletes the tensor itself.
    if (!PyCapsule_IsValid(object, kCapsule)) return;
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(object, kCapsule));
    managed->deleter(managed);
  });
  ++*buffer->views;
  exported.release();
  return capsule;
}

using RangeList = std::vector<std::tuple<int64_t, int64_t, int64_t>>;  // (page, count, span)
std::vector<PageRange> Ranges(const RangeList& ranges) {
  std::vector<PageRange> result;
  result.reserve(ranges.size());
  for (const auto& [page, count, span] : ranges) result.push_back({page, count, span});
  return result;
}

using Parts = std::vector<std::pair<std::shared_ptr<ExportedBuffer>, RangeList>>;

// Shares the ownership of the exported buffers.
PagedBuffer::Work WorkOf(const Parts& parts) {
  PagedBuffer::Work work;
  work.reserve(parts.size());
  for (const auto& [exported, ranges] : parts) {
    work.emplace_back(std::shared_ptr<PagedBuffer>(exported, &exported->buffer), Ranges(ranges));
  }
  return work;
}

template <typename Handler>
py::capsule Target(Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

// Raises the Python class `errors.NAME` with the fields of the C++ error.
void TranslateErrors(std::exception_ptr pointer) {
  const auto raise = [](const char* name, auto&&... fields) {
    py::object type = py::module_::import("jax_vattention.errors").attr(name);
    py::object error = type(std::forward<decltype(fields)>(fields)...);
    PyErr_SetObject(type.ptr(), error.ptr());
  };
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const DriverError& error) {
    raise("DriverError", error.what(), error.call, error.code, error.name, error.state, error.out_of_memory);
  } catch (const DriverUnavailable& error) {
    raise("DriverUnavailableError", error.what());
  } catch (const OutOfPages& error) {
    raise("OutOfPagesError", error.what());
  }
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Virtual memory, page pools and custom calls of jax_vattention.";
  py::register_local_exception_translator(TranslateErrors);
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  // Destructors of these call the driver, or wait for a thread.
  using Unlocking = py::release_gil_before_calling_cpp_dtor;

  py::class_<Memory, std::shared_ptr<Memory>>(module, "Memory")
      .def_static("host", &OpenHostMemory, py::arg("strict"))
      .def_static("cuda", &OpenCudaMemory, py::arg("ordinal"), Unlocked())
      .def_property_readonly("platform", &Memory::platform)
      .def_property_readonly("granularity", &Memory::granularity)
      .def("calls", &Memory::calls)
      .def("info",
           [](Memory& memory) {
             const MemoryInfo info = memory.Info();
             return std::make_pair(info.free_bytes, info.total_bytes);
           })
      .def("inject_failure", &Memory::InjectFailure, py::arg("calls"), py::arg("out_of_memory"),
           py::arg("times") = 1)
      .def_property_readonly("injected", &Memory::injected)
      .def("set_delay", &Memory::SetDelay, py::arg("microseconds"));

  py::class_<PagePool, std::shared_ptr<PagePool>>(module, "PagePool", Unlocking())
      .def(py::init<std::shared_ptr<Memory>, std::vector<size_t>, size_t>(), py::arg("memory"), py::arg("page_bytes"),
           py::arg("total_bytes"))
      .def_property_readonly("page_bytes", &PagePool::page_bytes)
      .def_property_readonly("total_bytes", &PagePool::total_bytes)
      .def_property_readonly("free_bytes", &PagePool::free_bytes)
      .def_property_readonly("created_bytes", &PagePool::created_bytes)
      .def("counts", [](const PagePool& self) {
        std::vector<std::tuple<size_t, int64_t, int64_t>> counts;
        py::gil_scoped_release unlocked;
        for (const PagePool::Count& count : self.counts()) {
          counts.emplace_back(count.page_bytes, count.created, count.idle);
        }
        return counts;
      });

  py::class_<ExportedBuffer, std::shared_ptr<ExportedBuffer>>(module, "PagedBuffer", Unlocking())
      .def(py::init<std::shared_ptr<PagePool>, size_t>(), py::arg("pool"), py::arg("bytes"))
      .def_property_readonly("address", [](const ExportedBuffer& self) { return self.buffer.address(); })
      .def_property_readonly("bytes", [](const ExportedBuffer& self) { return self.buffer.bytes(); })
      .def_property_readonly("mapped_pages", [](const ExportedBuffer& self) { return self.buffer.mapped_pages(); })
      .def_property_readonly("views", [](const ExportedBuffer& self) { return self.views->load(); })
      .def_property_readonly("dlpack_device",
                             [](const ExportedBuffer& self) {
                               const dlpack::Device device = DeviceOf(self.buffer);
                               return std::make_pair(device.type, device.id);
                             })
      .def("dlpack", &ToDlpack, py::arg("shape"), py::arg("dtype"), py::arg("offset"))
      .def(
          "map",
          [](const std::shared_ptr<ExportedBuffer>& self, const RangeList& ranges, bool zero) {
            const PagedBuffer::Work work = WorkOf({{self, ranges}});
            py::gil_scoped_release unlocked;
            PagedBuffer::Map(work, zero);
          },
          py::arg("ranges"), py::arg("zero"))
      .def(
          "unmap",
          [](const std::shared_ptr<ExportedBuffer>& self, const RangeList& ranges) {
            const PagedBuffer::Work work = WorkOf({{self, ranges}});
            py::gil_scoped_release unlocked;
            PagedBuffer::Unmap(work);
          },
          py::arg("ranges"))
      .def(
          "zero",
          [](const std::shared_ptr<ExportedBuffer>& self, const RangeList& ranges) {
            const PagedBuffer::Work work = WorkOf({{self, ranges}});
            py::gil_scoped_release unlocked;
            PagedBuffer::Zero(work);
          },
          py::arg("ranges"));

  py::class_<Mapper>(module, "Mapper", Unlocking())
      .def(py::init<>())
      .def(
          "map",
          [](Mapper& self, const Parts& parts, bool zero) {
            return self.Submit([work = WorkOf(parts), zero] { PagedBuffer::Map(work, zero); });
          },
          py::arg("parts"), py::arg("zero"))
      .def(
          "unmap",
          [](Mapper& self, const Parts& parts) {
            return self.Submit([work = WorkOf(parts)] { PagedBuffer::Unmap(work); });
          },
          py::arg("parts"))
      .def(
          "zero",
          [](Mapper& self, const Parts& parts) {
            return self.Submit([work = WorkOf(parts)] { PagedBuffer::Zero(work); });
          },
          py::arg("parts"))
      .def_property_readonly("completed", &Mapper::completed)
      .def("wait", &Mapper::Wait, py::arg("ticket"), Unlocked())
      .def("raise_if_failed", &Mapper::ThrowIfFailed, py::arg("ticket"))
      .def_property_readonly("busy_seconds", [](const Mapper& self) { return self.counts().busy_seconds; });

  module.def("load_append_kernel", [](int ordinal, const py::bytes& image) {
    const std::string copy = image;
    py::gil_scoped_release unlocked;
    LoadAppendKernel(ordinal, copy.data());
  });
  module.def("ffi_targets", [] {
    py::list targets;
    targets.append(py::make_tuple("jax_vattention.append", "cpu", Target(AppendCpuHandler)));
    targets.append(py::make_tuple("jax_vattention.append", "CUDA", Target(AppendCudaHandler)));
    targets.append(py::make_tuple("jax_vattention.read_tile", "cpu", Target(ReadTileCpuHandler)));
    return targets;
  });
}

}  // namespace jax_vattention
