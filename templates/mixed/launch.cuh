// Launching a mixed grouped GEMM.
#pragma once
#include "direct/launch.cuh"
#include "mixed/kernel.cuh"

namespace moe::mixed {

template <class C>
int32_t make_params(MoeGroupedGemm const& gemm, Params& p) {
  MoeGemmOperands const& o = gemm.operands;
  // Rows are stored, and tokens read, in units of 16 bytes; factors count 32.
  if (gemm.num_groups > kMaxGroups || gemm.n % 32 || gemm.k % 32) return MOE_ERROR_CANNOT_IMPLEMENT;
  if (!direct::encode(p.tokens, o.tokens, 1, o.max_rows, int64_t(gemm.k) * (C::kFp8 ? 1 : 2), C::kTokens)) return MOE_ERROR_BAD_ARGUMENT;
  p.weights = static_cast<uint8_t const*>(o.weights);
  p.weight_scales = o.weight_scales;
  p.bias = o.bias;
  p.encoding = static_cast<MoeTokens>(o.encoding);
  p.alpha = o.alpha;
  p.beta = o.beta;
  p.clamp = o.clamp;
  p.multiplier = o.activation_multiplier;
  p.clamp_limit = o.clamp_limit;
  p.gate_row = o.gate_first ? 0 : gemm.n / 2;
  p.up_row = o.gate_first ? gemm.n / 2 : 0;
  p.expert_offsets = o.expert_offsets;
  p.tiles_taken = o.tiles_taken;
  p.output = o.output;
  p.groups = gemm.num_groups;
  p.n = gemm.n;
  p.k = gemm.k;
  p.offsets_ready = o.offsets_ready != 0;
  p.topk_ids = o.topk_ids;
  p.num_slots = static_cast<int>(o.max_rows);
  p.first_expert = o.local_expert_offset;
  p.row_origins = o.row_origins;
  return 0;
}

template <class C>
using Launch = direct::Launch<C, Params, grouped_gemm<C>, make_params<C>>;

}  // namespace moe::mixed
