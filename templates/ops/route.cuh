// One token's share of the route stage, used by the stage's own kernel and by the one that permutes and gathers as well:
// router logits -> top_k expert ids and weights, by one warp whose lanes hold E/32 candidates each in registers.
// Definitions (ties: lower expert id first):
// - Default takes the top_k logits, whose order is that of the probabilities, and their part of the softmax of all;
// - Renormalize and RenormalizeNaive, which differ in rounding only: the top_k logits and the softmax of those;
// - DeepSeekV3 chooses on sigmoid + bias among the best topk_group groups (score: sum of a group's two best) and
//   normalises the sigmoids chosen, times routed_scaling_factor; SigmoidRenorm and MiniMax2 are that without groups and
//   factor, the former without bias;
// - Llama4 takes the largest logit and its sigmoid.
// Shared experts follow in the last slots, with weight 1.
#pragma once
#include <cfloat>
#include <climits>

#include "ops.cuh"

namespace moe {

enum class Weighing { kSoftmaxOfAll, kSoftmaxOfChosen, kNormalisedSigmoids, kSigmoid };

inline Weighing weighing(int32_t routing_method) {
  switch (routing_method) {
    case MOE_ROUTING_DEFAULT: return Weighing::kSoftmaxOfAll;
    case MOE_ROUTING_LLAMA4: return Weighing::kSigmoid;
    case MOE_ROUTING_RENORMALIZE:
    case MOE_ROUTING_RENORMALIZE_NAIVE: return Weighing::kSoftmaxOfChosen;
    default: return Weighing::kNormalisedSigmoids;
  }
}

// num_experts and top_k without shared experts; `slots` of a token with them.
struct RouteParams {
  void const* logits;
  void const* bias;
  int32_t* ids;
  float* weights;
  int num_tokens, num_experts, top_k, slots, n_group, group_size, topk_group;
  float scaling;
  Weighing weighing;
  bool logits_f32, bias_f32;
};

inline RouteParams route_params(MoeLayer const& layer) {
  int const shared = layer.num_fused_shared_experts, experts = layer.num_experts - shared;
  return {layer.routing_logits, layer.routing_bias, layer.topk_ids, layer.topk_weights,
          layer.num_tokens, experts, layer.top_k - shared, layer.top_k, layer.n_group, experts / layer.n_group, layer.topk_group,
          layer.routed_scaling_factor, weighing(layer.routing_method),
          layer.routing_logits_dtype == MOE_DTYPE_F32, layer.routing_bias_dtype == MOE_DTYPE_F32};
}

__device__ __forceinline__ float load_float(void const* from, bool is_f32, int64_t index) {
  return is_f32 ? static_cast<float const*>(from)[index] : __bfloat162float(static_cast<__nv_bfloat16 const*>(from)[index]);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// values[i] is the one of expert i * 32 + lane. All are asked for before the first is used: otherwise latencies add up.
template <int kItems>
__device__ __forceinline__ void load_candidates(void const* from, bool is_f32, int64_t first, int num_experts, int lane, float (&values)[kItems]) {
  auto load_all = [&](auto const* row) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) values[i] = i * 32 + lane < num_experts ? static_cast<float>(row[i * 32 + lane]) : 0.0f;
  };
  if (is_f32) {
    load_all(static_cast<float const*>(from) + first);
  } else {
    load_all(static_cast<__nv_bfloat16 const*>(from) + first);
  }
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

// Bit g is set where group g is among the topk_group best. Lanes that divide a group between them start at places of
// their own, because groups of 32 experts lie in the same banks.
__device__ __forceinline__ uint32_t best_groups(float const* choice, RouteParams const& p, int lane) {
  int const shift = 31 - __clz(32 / p.n_group), lanes = 1 << shift; // lanes of one group
  int const group = lane >> shift, rotation = group * lanes % p.group_size;
  float first = -FLT_MAX, second = -FLT_MAX;
  if (group < p.n_group) {
    for (int i = lane % lanes; i < p.group_size; i += lanes) {
      int const rotated = i + rotation;
      float const x = choice[group * p.group_size + (rotated < p.group_size ? rotated : rotated - p.group_size)];
      second = fmaxf(second, fminf(first, x));
      first = fmaxf(first, x);
    }
  }
  for (int distance = 1; distance < lanes; distance *= 2) {
    float const other_first = __shfl_xor_sync(kAllLanes, first, distance);
    float const other_second = __shfl_xor_sync(kAllLanes, second, distance);
    second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
    first = fmaxf(first, other_first);
  }
  bool const scores = group < p.n_group && lane % lanes == 0;
  uint32_t keys[1] = {scores ? sortable(p.group_size > 1 ? first + second : first) : 0u};
  uint32_t chosen = 0;
  for (int i = 0; i < p.topk_group; ++i) chosen |= 1u << (take_best(keys, lane) >> shift);
  return chosen;
}

struct RoutedSlot {
  int expert;
  float weight;
};

// Must be reached by whole warps. Lane j < slots gets slot j of the token. choice: num_experts floats of shared memory
// that are the warp's own.
template <int kItems>
__device__ __forceinline__ RoutedSlot route_token(RouteParams const& p, int token, float* choice, int lane) {
  int64_t const first_logit = int64_t(token) * p.num_experts;
  float scores[kItems];
  load_candidates(p.logits, p.logits_f32, first_logit, p.num_experts, lane, scores);
  bool const sigmoids = p.weighing == Weighing::kNormalisedSigmoids;
  if (sigmoids) {
    float bias[kItems] = {};
    if (p.bias) load_candidates(p.bias, p.bias_f32, 0, p.num_experts, lane, bias);
#pragma unroll
    for (int i = 0; i < kItems; ++i) scores[i] = sigmoid(scores[i]) + bias[i];
  }
  uint32_t keys[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    bool const exists = i * 32 + lane < p.num_experts;
    if (exists) choice[i * 32 + lane] = scores[i];
    keys[i] = exists ? sortable(scores[i]) : 0;
  }
  __syncwarp();
  if (sigmoids && p.n_group > 1) {
    uint32_t const chosen = best_groups(choice, p, lane);
    float const groups_an_expert = 1.0f / p.group_size;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      // A division of integers would take ten times as long. The half keeps quotients off the integers, so this is exact.
      int const group = static_cast<int>((i * 32 + lane + 0.5f) * groups_an_expert);
      if (!(chosen >> group & 1)) keys[i] = 0;
    }
  }

  RoutedSlot slot{};
  for (int j = 0; j < p.top_k; ++j) {
    int const winner = take_best(keys, lane);
    if (lane == j) slot.expert = winner;
  }
  bool const holds = lane < p.top_k;
  if (sigmoids) {
    if (holds) slot.weight = sigmoid(load_float(p.logits, p.logits_f32, first_logit + slot.expert));
    slot.weight = slot.weight / (warp_sum(slot.weight) + 1e-20f) * p.scaling;
  } else if (p.weighing == Weighing::kSigmoid) {
    if (holds) slot.weight = sigmoid(choice[slot.expert]);
  } else {
    // The first winner holds the largest logit.
    float const largest = __shfl_sync(kAllLanes, holds ? choice[slot.expert] : 0.0f, 0);
    if (holds) slot.weight = expf(choice[slot.expert] - largest);
    float part = slot.weight;
    if (p.weighing == Weighing::kSoftmaxOfAll) {
      part = 0.0f;
      for (int e = lane; e < p.num_experts; e += 32) part += expf(choice[e] - largest);
    }
    slot.weight /= warp_sum(part);
  }
  if (lane >= p.top_k) slot = {p.num_experts + lane - p.top_k, 1.0f};
  return slot;
}

// Lane j < slots holds slot j of the token.
__device__ __forceinline__ void store_slot(RouteParams const& p, int token, RoutedSlot slot, int lane) {
  if (lane >= p.slots) return;
  p.ids[token * p.slots + lane] = slot.expert;
  p.weights[token * p.slots + lane] = slot.weight;
}

}  // namespace moe
