// One token's share of the gather stage, used by the stage's own kernel and by the one that permutes as well.
#pragma once
#include "ops.cuh"

namespace moe {

struct GatherParams {
  void const* hidden_states;
  void const* hidden_states_scale;
  int64_t token_stride, scale_token_stride, scale_block_stride;
  float const* input_weights; // [num_tokens], of routing that weighs the experts' input; null: none
  Rows rows;
  float input_scale_inverse;
  int num_tokens, top_k;
  bool quantised, by_token;
  __nv_bfloat16* output_to_zero;
  MoeMessages messages;
  int32_t* message_slots; // of the first message
};

inline GatherParams gather_params(MoeLayer const& layer, Buffers const& b) {
  Rows rows = adjacent_rows(b.rows, b.row_scales, layer.hidden_size);
  int32_t* message_slots = nullptr;
  if (MoeMessages const& m = layer.messages; m.rows) {
    bool const fp8_block = layer.tokens == MOE_TOKENS_FP8_BLOCK;
    int const value_bytes = fp8_block ? 1 : 2, scales = fp8_block ? layer.hidden_size / kBlock : 0;
    auto* const behind_values = reinterpret_cast<float*>(static_cast<uint8_t*>(m.rows) + layer.hidden_size * value_bytes);
    rows = {m.rows, behind_values, layer.hidden_size, m.pitch / value_bytes, m.pitch / 4};
    message_slots = reinterpret_cast<int32_t*>(behind_values + scales);
  }
  return {layer.hidden_states, layer.hidden_states_scale, layer.hidden_states_stride, layer.scale_token_stride, layer.scale_block_stride,
          weighs_input(layer) ? layer.topk_weights : nullptr, rows,
          layer.input_scale_inverse, layer.num_tokens, layer.top_k, layer.hidden_states_dtype != MOE_DTYPE_BF16,
          b.rows_by_token, b.zeroed_by_gather, layer.messages, message_slots};
}

// Threads that the stage needs: each encodes 16 values and writes them to the row of each of the token's local slots, or
// to the token's, and zeros where GEMM2 will add.
inline int gather_units(MoeLayer const& layer) { return layer.num_tokens * (layer.hidden_size / kValuesPerThread); }

// Must be reached by whole warps; loads only where the token is local. weight: null, or of the experts' input.
template <MoeTokens kTokens>
__device__ __forceinline__ Piece<kTokens> gather_piece(GatherParams const& p, int token, int chunk, bool local, float const* weight) {
  int64_t const from = token * p.token_stride + chunk * kValuesPerThread;
  Values values = {};
  if (local && !p.quantised) load_bf16x16(static_cast<__nv_bfloat16 const*>(p.hidden_states) + from, values);
  if constexpr (kTokens == MOE_TOKENS_FP8_BLOCK) {
    Piece<kTokens> piece{};
    if (!p.quantised) {
      piece = encode16<kTokens>(values);
    } else if (local) {
      piece.values = *reinterpret_cast<uint4 const*>(static_cast<uint8_t const*>(p.hidden_states) + from);
      piece.scale = static_cast<float const*>(p.hidden_states_scale)[token * p.scale_token_stride + chunk / kLanesPerBlock * p.scale_block_stride];
    }
    if (local && weight) piece.scale *= *weight; // the codes stay as they are
    return piece;
  } else {
    float scale = p.quantised ? 1.0f : p.input_scale_inverse;
    if constexpr (kTokens != MOE_TOKENS_BF16) {
      if (local && p.quantised) load_quantised16<kTokens>(p.hidden_states, p.hidden_states_scale, int64_t(token) * p.rows.width + chunk * kValuesPerThread, values);
    }
    if (local && weight) scale *= *weight;
#pragma unroll
    for (int i = 0; i < kValuesPerThread; ++i) values[i] *= scale;
    return p.quantised && !weight ? pack16<kTokens>(values) : encode16<kTokens>(values);
  }
}

// What a message holds behind the row itself: the token's ids and weights, of which each thread of the row copies some.
__device__ __forceinline__ void store_slots(GatherParams const& p, int64_t row, int token, int chunk, int chunks) {
  MoeMessages const& m = p.messages;
  int32_t* const ids = p.message_slots + row * (m.pitch / 4);
  auto* const weights = reinterpret_cast<float*>(ids + m.slots);
  for (int j = chunk; j < m.slots; j += chunks) {
    ids[j] = m.ids[token * m.slots + j];
    weights[j] = m.weights[token * m.slots + j];
  }
}

// A unit's share of the zeros where GEMM2 will add. By warps: each of their stores is to adjacent bytes.
__device__ __forceinline__ void zero_unit(GatherParams const& p, int unit) {
  if (!p.output_to_zero) return;
  uint32_t const lane = threadIdx.x % 32, first = 2 * (unit - lane) + lane, end = 2u * p.num_tokens * (p.rows.width / kValuesPerThread);
  auto* const output = reinterpret_cast<uint4*>(p.output_to_zero);
  if (first < end) output[first] = uint4{};
  if (first + 32 < end) output[first + 32] = uint4{};
}

struct Unit {
  int token, chunk, chunks;
  __device__ __forceinline__ Unit(GatherParams const& p, int unit)
      : token(unit / (p.rows.width / kValuesPerThread)), chunk(unit % (p.rows.width / kValuesPerThread)), chunks(p.rows.width / kValuesPerThread) {}
};

// What a unit stores. Must be reached by whole warps; input_weights as in the params.
template <MoeTokens kTokens>
__device__ __forceinline__ Piece<kTokens> encode_unit(GatherParams const& p, int unit, bool local, float const* input_weights) {
  Unit const at(p, unit);
  return gather_piece<kTokens>(p, at.token, at.chunk, local, input_weights ? input_weights + at.token : nullptr);
}

// Must be reached by whole warps. permuted_row[token * top_k + j], in global or shared memory, is a slot's row or -1.
// encode(local): the unit's piece, which may be anything of a token that is not.
template <MoeTokens kTokens, class Encode>
__device__ __forceinline__ void gather_unit(GatherParams const& p, int unit, int32_t const* permuted_row, Encode encode) {
  constexpr int kBatch = 8; // rows looked up together: one by one, each store would wait for its own
  auto const [token, chunk, chunks] = Unit(p, unit);
  int32_t const* const slots = permuted_row + int64_t(token) * p.top_k;
  int const top_k = token < p.num_tokens ? p.top_k : 0;
  int row[kBatch];
  bool local = false;
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    row[i] = i < top_k ? slots[i] : -1;
    local |= row[i] >= 0;
  }
  for (int j = kBatch; j < top_k; ++j) local |= slots[j] >= 0;
  Piece<kTokens> const piece = encode(local);
  __syncwarp(); // the output may be the input: all lanes have read theirs
  zero_unit(p, unit);
  if (!local) return;
  if (p.by_token) return piece.store(p.rows, token, chunk);
  auto store = [&, token = token, chunk = chunk, chunks = chunks](int to) {
    if (to < 0) return;
    piece.store(p.rows, to, chunk);
    if constexpr (kTokens == MOE_TOKENS_FP8_BLOCK || kTokens == MOE_TOKENS_BF16) {  // in which rows travel; see messages_fit
      if (p.message_slots) store_slots(p, to, token, chunk, chunks);
    }
  };
#pragma unroll
  for (int i = 0; i < kBatch; ++i) store(row[i]);
  for (int j = kBatch; j < top_k; ++j) store(slots[j]);
}

}  // namespace moe
