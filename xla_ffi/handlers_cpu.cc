// XLA FFI custom calls on the CPU.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "append.h"
#include "handlers.h"

namespace jax_vattention {

namespace ffi = xla::ffi;

ffi::ErrorOr<AppendArgs> DecodeAppend(ffi::AnyBuffer view, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                      ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> slots,
                                      ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::PRED> mask,
                                      ffi::Buffer<ffi::S32> mapped_lens, ffi::Buffer<ffi::S32> order,
                                      ffi::Result<ffi::Buffer<ffi::S32>> order_out) {
  const auto invalid = [](const char* what) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("append: ") + what));
  };
  const auto shape = view.dimensions();
  const auto source = k.dimensions();
  if (shape.size() != 6 || shape[3] != 2) return invalid("view must be [slots, tokens, layers, 2, heads, head_dim]");
  const bool joined = source.size() == 4;
  if (source.size() != 3 && !joined) return invalid("k must be [tokens, heads, head_dim] or [tokens, 2, heads, head_dim]");
  const size_t tokens = source[0];
  const size_t heads = source.size() - 2;
  if (source[heads] != shape[4] || source[heads + 1] != shape[5]) return invalid("k and view differ in heads or head_dim");
  if (k.element_type() != view.element_type() || v.element_type() != view.element_type()) {
    return invalid("k, v and view must have one dtype");
  }
  if (v.element_count() != k.element_count()) return invalid("k and v must have one shape");
  if (layer.element_count() != 1 || slots.element_count() != tokens || positions.element_count() != tokens ||
      mask.element_count() != tokens || static_cast<int64_t>(mapped_lens.element_count()) != shape[0] ||
      order.element_count() != 4) {
    return invalid("layer, slots, positions, mask, mapped_lens or order has the wrong size");
  }
  if (order.typed_data() != order_out->typed_data()) return invalid("order must be aliased with the result");

  AppendArgs args;
  args.part_bytes = shape[4] * shape[5] * static_cast<int64_t>(ffi::ByteWidth(view.element_type()));
  args.source_stride = joined ? 2 * args.part_bytes : args.part_bytes;
  args.view = static_cast<char*>(view.untyped_data());
  args.k = static_cast<const char*>(k.untyped_data());
  args.v = joined ? args.k + args.part_bytes : static_cast<const char*>(v.untyped_data());
  args.layer = layer.typed_data();
  args.slots = slots.typed_data();
  args.positions = positions.typed_data();
  args.mask = mask.typed_data();
  args.mapped_lens = mapped_lens.typed_data();
  args.order = order_out->typed_data();
  args.tokens = tokens;
  args.num_slots = shape[0];
  args.slot_tokens = shape[1];
  args.num_layers = shape[2];
  return args;
}

namespace {

// Where a token goes, or null if it must be dropped.
char* Destination(const AppendArgs& args, int64_t token) {
  const int64_t slot = args.slots[token];
  const int64_t position = args.positions[token];
  const int64_t layer = *args.layer;
  if (layer < 0 || layer >= args.num_layers || slot < 0 || slot >= args.num_slots) return nullptr;
  if (position < 0 || position >= args.mapped_lens[slot]) return nullptr;
  return args.view + ((slot * args.slot_tokens + position) * args.num_layers + layer) * 2 * args.part_bytes;
}

// Writes tokens [first, last), leaving out those that must be dropped.
void WriteTokens(const AppendArgs& args, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    if (!args.mask[token]) continue;
    char* destination = Destination(args, token);
    if (destination == nullptr) continue;
    std::memcpy(destination, args.k + token * args.source_stride, args.part_bytes);
    std::memcpy(destination + args.part_bytes, args.v + token * args.source_stride, args.part_bytes);
  }
}

void RecordDropped(const AppendArgs& args) {
  for (int64_t token = 0; token < args.tokens; ++token) {
    if (!args.mask[token] || Destination(args, token) != nullptr) continue;
    if (args.order[0]++ > 0) continue;
    const int32_t slot = args.slots[token];
    args.order[1] = slot;
    args.order[2] = args.positions[token];
    args.order[3] = slot < 0 || slot >= args.num_slots ? 0 : args.mapped_lens[slot];
  }
}

constexpr int64_t kBlockBytes = 1 << 18;  // below this a task costs more than the copy

// Blocks of tokens that threads claim one by one. The caller claims too and waits only for blocks that a thread is
// copying, so that a pool with no thread to spare cannot hold it up.
struct Blocks {
  AppendArgs args;
  int64_t block_tokens;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable changed;
  int64_t done = 0;

  void Work() {
    for (int64_t block = next++; block < count; block = next++) {
      WriteTokens(args, block * block_tokens, std::min(args.tokens, (block + 1) * block_tokens));
      std::lock_guard<std::mutex> lock(mutex);
      if (++done == count) changed.notify_all();
    }
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return done == count; });
  }
};

ffi::Error AppendCpu(ffi::ThreadPool threads, ffi::AnyBuffer view, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> positions,
                     ffi::Buffer<ffi::PRED> mask, ffi::Buffer<ffi::S32> mapped_lens, ffi::Buffer<ffi::S32> order,
                     ffi::Result<ffi::Buffer<ffi::S32>> order_out) {
  const auto args = DecodeAppend(view, k, v, layer, slots, positions, mask, mapped_lens, order, order_out);
  if (!args) return args.error();
  const int64_t block_tokens = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, 2 * args->part_bytes));
  const int64_t count = (args->tokens + block_tokens - 1) / block_tokens;
  if (count <= 1) {
    WriteTokens(*args, 0, args->tokens);
  } else {
    auto blocks = std::make_shared<Blocks>();
    blocks->args = *args;
    blocks->block_tokens = block_tokens;
    blocks->count = count;
    for (int64_t i = 1; i < std::min(count, threads.num_threads()); ++i) {
      threads.Schedule([blocks] { blocks->Work(); });
    }
    blocks->Work();
    blocks->Wait();
  }
  RecordDropped(*args);
  return ffi::Error::Success();
}

// read_tile(view, layer, slot, first, length, order) -> tile
//
//   view    as in append.h, of any dtype
//   layer, slot, first, length  int32 []: the tokens first <= t < length of a slot are read, and no others
//   order   int32 [4]: read for nothing but its place behind the append that made it
//   tile    [2, tokens, num_kv_heads, head_dim] of the view's dtype; zeros from `length` on
ffi::Error ReadTileCpu(ffi::AnyBuffer view, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> slot,
                       ffi::Buffer<ffi::S32> first, ffi::Buffer<ffi::S32> length, ffi::Buffer<ffi::S32> order,
                       ffi::Result<ffi::AnyBuffer> tile) {
  const auto shape = view.dimensions();
  const auto size = tile->dimensions();
  if (shape.size() != 6 || size.size() != 4 || size[0] != 2 || size[2] != shape[4] || size[3] != shape[5] ||
      tile->element_type() != view.element_type() || order.element_count() != 4) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "read_tile: the shapes of view and tile do not fit");
  }
  const int64_t part_bytes = shape[4] * shape[5] * static_cast<int64_t>(ffi::ByteWidth(view.element_type()));
  const int64_t at_layer = *layer.typed_data();
  const int64_t at_slot = *slot.typed_data();
  const int64_t start = *first.typed_data();
  const bool exists = at_layer >= 0 && at_layer < shape[2] && at_slot >= 0 && at_slot < shape[0] && start >= 0;
  const int64_t end = std::min<int64_t>(*length.typed_data(), shape[1]);
  const int64_t tokens = exists ? std::clamp<int64_t>(end - start, 0, size[1]) : 0;
  const char* source = static_cast<const char*>(view.untyped_data()) +
                       ((at_slot * shape[1] + start) * shape[2] + at_layer) * 2 * part_bytes;
  const int64_t source_stride = shape[2] * 2 * part_bytes;
  for (int64_t part = 0; part < 2; ++part) {
    char* destination = static_cast<char*>(tile->untyped_data()) + part * size[1] * part_bytes;
    for (int64_t i = 0; i < tokens; ++i) {
      std::memcpy(destination + i * part_bytes, source + i * source_stride + part * part_bytes, part_bytes);
    }
    std::memset(destination + tokens * part_bytes, 0, (size[1] - tokens) * part_bytes);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ReadTileCpuHandler, ReadTileCpu,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()            // view
                                  .Arg<ffi::Buffer<ffi::S32>>()     // layer
                                  .Arg<ffi::Buffer<ffi::S32>>()     // slot
                                  .Arg<ffi::Buffer<ffi::S32>>()     // first
                                  .Arg<ffi::Buffer<ffi::S32>>()     // length
                                  .Arg<ffi::Buffer<ffi::S32>>()     // order
                                  .Ret<ffi::AnyBuffer>());          // tile

XLA_FFI_DEFINE_HANDLER_SYMBOL(AppendCpuHandler, AppendCpu, BindAppend(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace jax_vattention
