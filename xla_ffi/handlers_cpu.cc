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

namespace {

// A view as the custom calls see it, in bytes.
struct ViewLayout {
  int64_t num_slots;
  int64_t slot_runs;
  int64_t run_tokens;  // that lie together in one layer
  int64_t num_layers;
  int64_t heads;
  int64_t head_dim;
  int64_t part_bytes;    // K, or V, of one token and layer
  int64_t layer_bytes;   // from one layer to the next
  int64_t v_offset;      // from K to V, where both are in one view
};

// From the start of a view to a token of a layer.
template <typename Layout>
int64_t Offset(const Layout& layout, int64_t slot, int64_t position, int64_t layer) {
  const int64_t run = slot * layout.slot_runs + position / layout.run_tokens;
  return (run * layout.num_layers + layer) * layout.layer_bytes + position % layout.run_tokens * layout.part_bytes;
}

// Reads the layout off two views of one shape. Returns false where they have none.
bool DecodeViews(ffi::AnyBuffer k_view, ffi::AnyBuffer v_view, ViewLayout* layout) {
  const auto shape = k_view.dimensions();
  const auto other = v_view.dimensions();
  if (!std::equal(shape.begin(), shape.end(), other.begin(), other.end())) return false;
  if (k_view.element_type() != v_view.element_type()) return false;
  const bool token_major = shape.size() == 7 && shape[3] == 2;
  if (!token_major && shape.size() != 4) return false;
  const size_t heads = shape.size() - 2;
  layout->num_slots = shape[0];
  layout->slot_runs = shape[1];
  layout->run_tokens = token_major ? shape[4] : 1;
  layout->num_layers = token_major ? shape[2] : 1;
  layout->heads = shape[heads];
  layout->head_dim = shape[heads + 1];
  layout->part_bytes = shape[heads] * shape[heads + 1] * static_cast<int64_t>(ffi::ByteWidth(k_view.element_type()));
  const int64_t run_bytes = layout->run_tokens * layout->part_bytes;
  layout->layer_bytes = token_major ? 2 * run_bytes : run_bytes;
  layout->v_offset = token_major ? run_bytes : 0;
  return true;
}

constexpr const char* kViews =
    "the views must be one operand twice, [slots, runs, layers, 2, tokens, heads, head_dim], or two of one dtype, "
    "[slots, tokens, heads, head_dim]";

}  // namespace

ffi::ErrorOr<AppendArgs> DecodeAppend(ffi::AnyBuffer k_view, ffi::AnyBuffer v_view, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                      ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> slots,
                                      ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::PRED> mask,
                                      ffi::Buffer<ffi::S32> mapped, ffi::Buffer<ffi::S32> order,
                                      AppendResult order_out) {
  const auto invalid = [](const char* what) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("append: ") + what));
  };
  ViewLayout layout;
  if (!DecodeViews(k_view, v_view, &layout)) return invalid(kViews);
  const auto source = k.dimensions();
  const bool joined = source.size() == 4;
  if (source.size() != 3 && !joined) return invalid("k must be [tokens, heads, head_dim] or [tokens, 2, heads, head_dim]");
  const size_t tokens = source[0];
  const size_t heads = source.size() - 2;
  if (source[heads] != layout.heads || source[heads + 1] != layout.head_dim) {
    return invalid("k and view differ in heads or head_dim");
  }
  if (k.element_type() != k_view.element_type() || v.element_type() != k_view.element_type()) {
    return invalid("k, v and view must have one dtype");
  }
  if (v.element_count() != k.element_count()) return invalid("k and v must have one shape");
  if (layer.element_count() != 1 || slots.element_count() != tokens || positions.element_count() != tokens ||
      mask.element_count() != tokens || static_cast<int64_t>(mapped.element_count()) != 2 * layout.num_slots ||
      order.element_count() != 4) {
    return invalid("layer, slots, positions, mask, mapped or order has the wrong size");
  }
  if (order.typed_data() != order_out->typed_data()) return invalid("order must be aliased with the result");

  AppendArgs args;
  args.k_view = static_cast<char*>(k_view.untyped_data());
  args.v_view = static_cast<char*>(v_view.untyped_data()) + layout.v_offset;
  args.k = static_cast<const char*>(k.untyped_data());
  args.v = joined ? args.k + layout.part_bytes : static_cast<const char*>(v.untyped_data());
  args.layer = layer.typed_data();
  args.slots = slots.typed_data();
  args.positions = positions.typed_data();
  args.mask = mask.typed_data();
  args.mapped = mapped.typed_data();
  args.order = order_out->typed_data();
  args.tokens = tokens;
  args.num_slots = layout.num_slots;
  args.slot_runs = layout.slot_runs;
  args.run_tokens = layout.run_tokens;
  args.num_layers = layout.num_layers;
  args.part_bytes = layout.part_bytes;
  args.layer_bytes = layout.layer_bytes;
  args.source_stride = joined ? 2 * layout.part_bytes : layout.part_bytes;
  return args;
}

namespace {

// Where in the views a token goes, or a negative number if it must be dropped.
int64_t Destination(const AppendArgs& args, int64_t token) {
  const int64_t slot = args.slots[token];
  const int64_t position = args.positions[token];
  const int64_t layer = *args.layer;
  if (layer < 0 || layer >= args.num_layers || slot < 0 || slot >= args.num_slots) return -1;
  if (position < args.mapped[slot] || position >= args.mapped[args.num_slots + slot]) return -1;
  return Offset(args, slot, position, layer);
}

// Writes tokens [first, last), leaving out those that must be dropped.
void WriteTokens(const AppendArgs& args, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    if (!args.mask[token]) continue;
    const int64_t offset = Destination(args, token);
    if (offset < 0) continue;
    std::memcpy(args.k_view + offset, args.k + token * args.source_stride, args.part_bytes);
    std::memcpy(args.v_view + offset, args.v + token * args.source_stride, args.part_bytes);
  }
}

void RecordDropped(const AppendArgs& args) {
  for (int64_t token = 0; token < args.tokens; ++token) {
    if (!args.mask[token] || Destination(args, token) >= 0) continue;
    if (args.order[0]++ > 0) continue;
    const int32_t slot = args.slots[token];
    args.order[1] = slot;
    args.order[2] = args.positions[token];
    args.order[3] = slot < 0 || slot >= args.num_slots ? 0 : args.mapped[args.num_slots + slot];
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

ffi::Error AppendCpu(ffi::ThreadPool threads, ffi::AnyBuffer k_view, ffi::AnyBuffer v_view, ffi::AnyBuffer k,
                     ffi::AnyBuffer v, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> slots,
                     ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::PRED> mask, ffi::Buffer<ffi::S32> mapped,
                     ffi::Buffer<ffi::S32> order, AppendResult order_out) {
  const auto args = DecodeAppend(k_view, v_view, k, v, layer, slots, positions, mask, mapped, order, order_out);
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

// read_tile(k_view, v_view, layer, slot, start, first, last, order) -> tile
//
//   k_view, v_view, layer  as in append.h, of any dtype
//   slot, start            int32 []: the tile begins at token `start` of a slot
//   first, last            int32 []: of its tokens those with first <= token < last are read, and no others
//   order                  int32 [4]: read for nothing but its place behind the append that made it
//   tile                   [2, tokens, num_kv_heads, head_dim] of the views' dtype; zeros for what is not read
ffi::Error ReadTileCpu(ffi::AnyBuffer k_view, ffi::AnyBuffer v_view, ffi::Buffer<ffi::S32> layer,
                       ffi::Buffer<ffi::S32> slot, ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> first,
                       ffi::Buffer<ffi::S32> last, ffi::Buffer<ffi::S32> order, ffi::Result<ffi::AnyBuffer> tile) {
  ViewLayout layout;
  if (!DecodeViews(k_view, v_view, &layout)) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("read_tile: ") + kViews);
  }
  const auto size = tile->dimensions();
  if (size.size() != 4 || size[0] != 2 || size[2] != layout.heads || size[3] != layout.head_dim ||
      tile->element_type() != k_view.element_type() || order.element_count() != 4) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "read_tile: the shapes of views and tile do not fit");
  }
  const int64_t at_layer = *layer.typed_data();
  const int64_t at_slot = *slot.typed_data();
  const int64_t begin = *start.typed_data();
  const bool exists = at_layer >= 0 && at_layer < layout.num_layers && at_slot >= 0 && at_slot < layout.num_slots;
  // Tokens [skipped, end) of the tile are read.
  const int64_t tokens = size[1];
  const int64_t readable_from = std::max<int64_t>(*first.typed_data(), 0);
  const int64_t slot_tokens = layout.slot_runs * layout.run_tokens;
  const int64_t readable_to = exists ? std::min<int64_t>(*last.typed_data(), slot_tokens) : 0;
  const int64_t skipped = std::clamp<int64_t>(readable_from - begin, 0, tokens);
  const int64_t end = std::clamp<int64_t>(readable_to - begin, skipped, tokens);
  for (int64_t part = 0; part < 2; ++part) {
    const char* view = static_cast<const char*>(part == 0 ? k_view.untyped_data() : v_view.untyped_data());
    char* destination = static_cast<char*>(tile->untyped_data()) + part * tokens * layout.part_bytes;
    std::memset(destination, 0, skipped * layout.part_bytes);
    for (int64_t i = skipped, together = 0; i < end; i += together) {
      const int64_t token = begin + i;
      together = std::min(end - i, layout.run_tokens - token % layout.run_tokens);
      const char* source = view + part * layout.v_offset + Offset(layout, at_slot, token, at_layer);
      std::memcpy(destination + i * layout.part_bytes, source, together * layout.part_bytes);
    }
    std::memset(destination + end * layout.part_bytes, 0, (tokens - end) * layout.part_bytes);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ReadTileCpuHandler, ReadTileCpu,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()            // k_view
                                  .Arg<ffi::AnyBuffer>()            // v_view
                                  .Arg<ffi::Buffer<ffi::S32>>()     // layer
                                  .Arg<ffi::Buffer<ffi::S32>>()     // slot
                                  .Arg<ffi::Buffer<ffi::S32>>()     // start
                                  .Arg<ffi::Buffer<ffi::S32>>()     // first
                                  .Arg<ffi::Buffer<ffi::S32>>()     // last
                                  .Arg<ffi::Buffer<ffi::S32>>()     // order
                                  .Ret<ffi::AnyBuffer>());          // tile

XLA_FFI_DEFINE_HANDLER_SYMBOL(AppendCpuHandler, AppendCpu, BindAppend(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace jax_vattention
