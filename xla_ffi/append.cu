// append on CUDA: copies k and v of each token to its place in the view. Compiled at run time through NVRTC, so it
// includes nothing. One block a token; it does no host work and can be captured in a CUDA graph.

typedef long long int64_t;

// The layout of AppendArgs in append.h.
struct AppendArgs {
  char* k_view;
  char* v_view;
  const char* k;
  const char* v;
  const int* layer;
  const int* slots;
  const int* positions;
  const bool* mask;
  const int* mapped;
  int* order;
  int64_t tokens;
  int64_t num_slots;
  int64_t slot_runs;
  int64_t run_tokens;
  int64_t num_layers;
  int64_t part_bytes;
  int64_t layer_bytes;
  int64_t source_stride;
};

template <typename Word>
__device__ void Copy(char* destination, const char* source, int64_t bytes) {
  const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t i = threadIdx.x; i < words; i += blockDim.x) {
    reinterpret_cast<Word*>(destination)[i] = reinterpret_cast<const Word*>(source)[i];
  }
}

template <typename Word>
__device__ void Append(const AppendArgs& args) {
  const int64_t token = blockIdx.x;
  if (!args.mask[token]) return;
  const int64_t layer = *args.layer;
  const int64_t slot = args.slots[token];
  const int64_t position = args.positions[token];
  const bool exists = layer >= 0 && layer < args.num_layers && slot >= 0 && slot < args.num_slots;
  const int first = exists ? args.mapped[slot] : 0;
  const int last = slot >= 0 && slot < args.num_slots ? args.mapped[args.num_slots + slot] : 0;
  if (!exists || position < first || position >= last) {
    if (threadIdx.x == 0 && atomicAdd(&args.order[0], 1) == 0) {
      args.order[1] = static_cast<int>(slot);
      args.order[2] = static_cast<int>(position);
      args.order[3] = last;
    }
    return;
  }
  const int run_tokens = static_cast<int>(args.run_tokens);
  const int64_t run = slot * args.slot_runs + static_cast<int>(position) / run_tokens;
  const int64_t offset = (run * args.num_layers + layer) * args.layer_bytes +
                         static_cast<int>(position) % run_tokens * args.part_bytes;
  Copy<Word>(args.k_view + offset, args.k + token * args.source_stride, args.part_bytes);
  Copy<Word>(args.v_view + offset, args.v + token * args.source_stride, args.part_bytes);
}

extern "C" __global__ void append_16(const __grid_constant__ AppendArgs args) { Append<uint4>(args); }
extern "C" __global__ void append_2(const __grid_constant__ AppendArgs args) { Append<unsigned short>(args); }
extern "C" __global__ void append_1(const __grid_constant__ AppendArgs args) { Append<unsigned char>(args); }
