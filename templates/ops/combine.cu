// output[t] = sum over the local slots of topk_weights[t, j] * gemm2_output[permuted_row[t, j]], in fp32 and in slot
// order, so the result is reproducible. A token without a local slot gets zeros.
#include "ops.cuh"

namespace moe {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;    // one 16-byte access of bf16
constexpr int kSlotsInFlight = 8;

struct CombineParams {
  __nv_bfloat16 const* gemm2_output;
  int32_t const* permuted_row;
  float const* weights; // null: ones
  __nv_bfloat16* output;
  int num_tokens, hidden_size, top_k;
};

__global__ void __launch_bounds__(kThreads) combine_kernel(CombineParams p) {
  allow_successor_to_start();
  wait_for_predecessor();
  int const chunks = p.hidden_size / kColumns;
  int const unit = blockIdx.x * kThreads + threadIdx.x;
  int const token = unit / chunks, column = unit % chunks * kColumns;
  if (token >= p.num_tokens) return;
  float sum[kColumns] = {};
  for (int first = 0; first < p.top_k; first += kSlotsInFlight) {
    float weight[kSlotsInFlight];
    uint4 packed[kSlotsInFlight];
#pragma unroll
    for (int j = 0; j < kSlotsInFlight; ++j) {
      int const slot = token * p.top_k + first + j;
      int const row = first + j < p.top_k ? p.permuted_row[slot] : -1;
      weight[j] = row < 0 ? 0.0f : p.weights ? p.weights[slot] : 1.0f;
      packed[j] = row >= 0 ? *reinterpret_cast<uint4 const*>(p.gemm2_output + int64_t(row) * p.hidden_size + column) : uint4{};
    }
#pragma unroll
    for (int j = 0; j < kSlotsInFlight; ++j) {
      float values[kColumns];
      load_bf16x8(reinterpret_cast<__nv_bfloat16 const*>(&packed[j]), values);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum[i] += weight[j] * values[i];
    }
  }
  *reinterpret_cast<uint4*>(p.output + int64_t(token) * p.hidden_size + column) = pack_bf16x8(sum);
}

}  // namespace

cudaError_t combine(MoeLayer const& layer, Buffers const& b) {
  CombineParams const p{b.gemm2_output, b.permuted_row, weighs_input(layer) ? nullptr : layer.topk_weights, static_cast<__nv_bfloat16*>(layer.output),
                        layer.num_tokens, layer.hidden_size, layer.top_k};
  int const grid = ceil_div(layer.num_tokens * (layer.hidden_size / kColumns), kThreads);
  return launch(combine_kernel, grid, kThreads, 0, layer.stream, p);
}

}  // namespace moe
