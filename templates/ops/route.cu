// Router logits -> top_k expert ids and weights: one warp a token, each lane holding E/32 candidates in registers.
// Definitions (ties: lower expert id first): Renormalize takes the top_k logits and their softmax; DeepSeekV3
// chooses on sigmoid + bias among the best topk_group groups (score: sum of a group's two best) and normalises
// the sigmoids chosen, times routed_scaling_factor.
#include <cfloat>
#include <climits>

#include "ops.cuh"

namespace moe {
namespace {

constexpr int kWarps = 4;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct RouteParams {
  void const* logits;
  void const* bias;
  int32_t* ids;
  float* weights;
  int num_tokens, num_experts, top_k, n_group, topk_group;
  float scaling;
  bool deepseek, logits_f32, bias_f32;
};

__device__ __forceinline__ float load(void const* from, bool is_f32, int64_t index) {
  return is_f32 ? static_cast<float const*>(from)[index] : __bfloat162float(static_cast<__nv_bfloat16 const*>(from)[index]);
}

// Order-preserving map of floats to unsigned; 0 stands below every float and marks a candidate as taken.
__device__ __forceinline__ uint32_t sortable(float x) {
  uint32_t const bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

template <int kItems>
__device__ __forceinline__ int take_best(uint32_t (&keys)[kItems], int lane) {
  uint32_t best = 0;
  int best_expert = INT_MAX;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (keys[i] > best) { best = keys[i]; best_expert = i * 32 + lane; }
  }
  uint32_t const winner_key = __reduce_max_sync(kAllLanes, best);
  int const winner = __reduce_min_sync(kAllLanes, best == winner_key ? best_expert : INT_MAX);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (winner == i * 32 + lane) keys[i] = 0;
  }
  return winner;
}

// Bit g is set where group g is among the topk_group best. Lane g scores group g.
__device__ __forceinline__ uint32_t best_groups(float const* choice, RouteParams const& p, int lane) {
  int const group_size = p.num_experts / p.n_group;
  float first = -FLT_MAX, second = -FLT_MAX;
  if (lane < p.n_group) {
    for (int i = 0; i < group_size; ++i) {
      float const x = choice[lane * group_size + i];
      if (x > first) { second = first; first = x; } else if (x > second) { second = x; }
    }
  }
  uint32_t keys[1] = {lane < p.n_group ? sortable(group_size > 1 ? first + second : first) : 0u};
  uint32_t chosen = 0;
  for (int i = 0; i < p.topk_group; ++i) chosen |= 1u << take_best<1>(keys, lane);
  return chosen;
}

template <int kItems>
__global__ void __launch_bounds__(kWarps * 32) route_kernel(RouteParams p) {
  extern __shared__ float shared[];
  allow_successor_to_start();
  wait_for_predecessor();
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int const token = blockIdx.x * kWarps + warp;
  if (token >= p.num_tokens) return;

  float* choice = shared + warp * p.num_experts;
  uint32_t keys[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    int const expert = i * 32 + lane;
    keys[i] = 0;
    if (expert < p.num_experts) {
      float x = load(p.logits, p.logits_f32, int64_t(token) * p.num_experts + expert);
      if (p.deepseek) x = 1.0f / (1.0f + expf(-x)) + (p.bias ? load(p.bias, p.bias_f32, expert) : 0.0f);
      choice[expert] = x;
      keys[i] = sortable(x);
    }
  }
  __syncwarp();
  if (p.deepseek && p.n_group > 1) {
    uint32_t const chosen = best_groups(choice, p, lane);
    int const group_size = p.num_experts / p.n_group;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i * 32 + lane < p.num_experts && !(chosen >> ((i * 32 + lane) / group_size) & 1)) keys[i] = 0;
    }
  }

  int my_expert = 0;
  for (int j = 0; j < p.top_k; ++j) {
    int const winner = take_best(keys, lane);
    if (lane == j) my_expert = winner;
  }
  bool const holds = lane < p.top_k;
  float weight = 0.0f;
  if (p.deepseek) {
    if (holds) weight = 1.0f / (1.0f + expf(-load(p.logits, p.logits_f32, int64_t(token) * p.num_experts + my_expert)));
    weight = weight / (warp_sum(weight) + 1e-20f) * p.scaling;
  } else {
    // The first winner holds the largest logit.
    float const largest = __shfl_sync(kAllLanes, holds ? choice[my_expert] : 0.0f, 0);
    if (holds) weight = expf(choice[my_expert] - largest);
    weight /= warp_sum(weight);
  }
  if (holds) {
    p.ids[token * p.top_k + lane] = my_expert;
    p.weights[token * p.top_k + lane] = weight;
  }
}

}  // namespace

cudaError_t route(MoeFp8BlockLayer const& layer) {
  RouteParams const p{layer.routing_logits, layer.routing_bias, layer.topk_ids, layer.topk_weights,
                      layer.num_tokens, layer.num_experts, layer.top_k, layer.n_group, layer.topk_group,
                      layer.routed_scaling_factor, layer.routing_method == MOE_ROUTING_DEEPSEEK_V3,
                      layer.routing_logits_dtype == MOE_DTYPE_F32, layer.routing_bias_dtype == MOE_DTYPE_F32};
  int const items = ceil_div(layer.num_experts, 32);
  auto kernel = items <= 4 ? route_kernel<4> : items <= 8 ? route_kernel<8> : items <= 16 ? route_kernel<16> : route_kernel<32>;
  return launch(kernel, ceil_div(layer.num_tokens, kWarps), kWarps * 32, kWarps * layer.num_experts * sizeof(float), layer.stream, p);
}

}  // namespace moe
