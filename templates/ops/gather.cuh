// One token's share of the gather stage, used by the stage's own kernel and by the one that permutes as well.
#pragma once
#include "ops.cuh"

namespace moe {

struct GatherParams {
  void const* hidden_states;
  float const* hidden_states_scale;
  int64_t scale_token_stride, scale_block_stride;
  uint8_t* rows;
  float* row_scales;
  int num_tokens, hidden_size, top_k;
};

inline GatherParams gather_params(MoeFp8BlockLayer const& layer, Buffers const& b) {
  return {layer.hidden_states, layer.hidden_states_scale, layer.scale_token_stride, layer.scale_block_stride,
          b.rows, b.row_scales, layer.num_tokens, layer.hidden_size, layer.top_k};
}

// Threads that the stage needs: each quantises 16 values and writes them to the row of each of the token's local slots.
inline int gather_units(MoeFp8BlockLayer const& layer) { return layer.num_tokens * (layer.hidden_size / kValuesPerThread); }

// Must be reached by whole warps. permuted_row[token * top_k + j], in global or shared memory, is a slot's row or -1.
template <bool kQuantised>
__device__ __forceinline__ void gather_unit(GatherParams const& p, int unit, int32_t const* permuted_row) {
  int const chunks = p.hidden_size / kValuesPerThread;
  int const token = unit / chunks, chunk = unit % chunks;
  int32_t const* const slots = permuted_row + int64_t(token) * p.top_k;
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

}  // namespace moe
