// hidden_states -> e4m3 rows grouped by expert. A token is read and quantised once and written to each of its local
// slots' rows; tokens without a local slot are not read at all.
#include "ops.cuh"

namespace moe {
namespace {

constexpr int kThreads = 256;

struct GatherParams {
  void const* hidden_states;
  float const* hidden_states_scale;
  int64_t scale_token_stride, scale_block_stride;
  int32_t const* permuted_row;
  uint8_t* rows;
  float* row_scales;
  int num_tokens, hidden_size, top_k;
};

template <bool kQuantised>
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherParams p) {
  allow_successor_to_start();
  wait_for_predecessor();
  int const chunks = p.hidden_size / kValuesPerThread;
  int const unit = blockIdx.x * kThreads + threadIdx.x;
  int const token = unit / chunks, chunk = unit % chunks;
  int32_t const* const slots = p.permuted_row + int64_t(token) * p.top_k;
  bool local = false;
  if (token < p.num_tokens) {
    for (int j = 0; j < p.top_k; ++j) local |= slots[j] >= 0;
  }
  int64_t const from = int64_t(token) * p.hidden_size + chunk * kValuesPerThread;
  uint4 packed{};
  float scale = 0.0f;
  if constexpr (kQuantised) {
    if (local) {
      packed = *reinterpret_cast<uint4 const*>(static_cast<uint8_t const*>(p.hidden_states) + from);
      scale = p.hidden_states_scale[token * p.scale_token_stride + chunk / kLanesPerBlock * p.scale_block_stride];
    }
  } else {
    float values[kValuesPerThread] = {};
    if (local) {
      auto const* source = static_cast<__nv_bfloat16 const*>(p.hidden_states) + from;
      load_bf16x8(source, values);
      load_bf16x8(source + 8, values + 8);
    }
    packed = quantise_block(values, scale);
  }
  if (!local) return;
  for (int j = 0; j < p.top_k; ++j) {
    int64_t const row = slots[j];
    if (row < 0) continue;
    *reinterpret_cast<uint4*>(p.rows + row * p.hidden_size + chunk * kValuesPerThread) = packed;
    if (chunk % kLanesPerBlock == 0) p.row_scales[row * (p.hidden_size / kBlock) + chunk / kLanesPerBlock] = scale;
  }
}

}  // namespace

cudaError_t gather(MoeFp8BlockLayer const& layer, Buffers const& b) {
  GatherParams const p{layer.hidden_states, layer.hidden_states_scale, layer.scale_token_stride, layer.scale_block_stride,
                       b.permuted_row, b.rows, b.row_scales, layer.num_tokens, layer.hidden_size, layer.top_k};
  int const grid = ceil_div(layer.num_tokens * (layer.hidden_size / kValuesPerThread), kThreads);
  auto kernel = layer.hidden_states_dtype == MOE_DTYPE_E4M3 ? gather_kernel<true> : gather_kernel<false>;
  return launch(kernel, grid, kThreads, 0, layer.stream, p);
}

}  // namespace moe
