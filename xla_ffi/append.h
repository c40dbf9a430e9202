// The arguments of `append`, checked and decoded once for every platform.
//
// append(k_view, v_view, k, v, layer, slots, positions, mask, mapped, order) -> order
//
//   k_view, v_view  written in place. token_major: one operand twice, [num_slots, slot_runs, num_layers, 2,
//                   run_tokens, num_kv_heads, head_dim], where a run is as many tokens as lie together in a layer;
//                   layer_major: two of [num_slots, slot_tokens, num_kv_heads, head_dim], a run is one token
//   k, v            [tokens, num_kv_heads, head_dim] of the views' dtype; or k [tokens, 2, num_kv_heads, head_dim]
//                   holding both, and v is the same operand again
//   layer           int32 []: index in the view; 0 in layer_major
//   slots           int32 [tokens]; positions: int32 [tokens]; mask: bool [tokens], false where there is nothing to
//                   write
//   mapped          int32 [2, num_slots]: of each slot the first token with memory behind it, and one past the last
//   order           int32 [4], aliased with the result: the order token, and the status of all appends that it has
//                   been through: (writes dropped, then slot, position and end of the mapped tokens of the first)
//
// A token is dropped when its layer or slot does not exist or its position is not one of its slot's mapped tokens.
#pragma once

#include <cstdint>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_vattention {

// One append in bytes. Plain data: it is also the parameter of the CUDA kernel, whose source repeats this layout.
struct AppendArgs {
  char* k_view;              // where K of layer 0 and token 0 lies
  char* v_view;
  const char* k;
  const char* v;
  const int32_t* layer;
  const int32_t* slots;
  const int32_t* positions;
  const bool* mask;
  const int32_t* mapped;
  int32_t* order;
  int64_t tokens;
  int64_t num_slots;
  int64_t slot_runs;
  int64_t run_tokens;
  int64_t num_layers;        // in the view
  int64_t part_bytes;        // K, or V, of one token and layer
  int64_t layer_bytes;       // from one layer to the next in the view
  int64_t source_stride;     // from one token to the next in k and in v, in bytes
};

// What append returns.
using AppendResult = xla::ffi::Result<xla::ffi::Buffer<xla::ffi::S32>>;

xla::ffi::ErrorOr<AppendArgs> DecodeAppend(xla::ffi::AnyBuffer k_view, xla::ffi::AnyBuffer v_view,
                                           xla::ffi::AnyBuffer k, xla::ffi::AnyBuffer v,
                                           xla::ffi::Buffer<xla::ffi::S32> layer,
                                           xla::ffi::Buffer<xla::ffi::S32> slots,
                                           xla::ffi::Buffer<xla::ffi::S32> positions,
                                           xla::ffi::Buffer<xla::ffi::PRED> mask,
                                           xla::ffi::Buffer<xla::ffi::S32> mapped,
                                           xla::ffi::Buffer<xla::ffi::S32> order, AppendResult order_out);

// Binds the operands and the result of append to a binding that has its context arguments already.
template <typename Binding>
auto BindAppend(Binding binding) {
  namespace ffi = xla::ffi;
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()                // k_view
      .template Arg<ffi::AnyBuffer>()                // v_view
      .template Arg<ffi::AnyBuffer>()                // k
      .template Arg<ffi::AnyBuffer>()                // v
      .template Arg<ffi::Buffer<ffi::S32>>()         // layer
      .template Arg<ffi::Buffer<ffi::S32>>()         // slots
      .template Arg<ffi::Buffer<ffi::S32>>()         // positions
      .template Arg<ffi::Buffer<ffi::PRED>>()        // mask
      .template Arg<ffi::Buffer<ffi::S32>>()         // mapped
      .template Arg<ffi::Buffer<ffi::S32>>()         // order
      .template Ret<ffi::Buffer<ffi::S32>>();        // order
}

}  // namespace jax_vattention
