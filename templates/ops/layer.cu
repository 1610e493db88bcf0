// A whole layer as one call: workspace layout, argument checks and the sequence of stages.
#include <climits>

#include "ops.cuh"

namespace moe {
namespace {

// Hands out consecutive 256-byte aligned regions.
struct Arena {
  int64_t used = 0;
  int64_t take(int64_t bytes) {
    int64_t const at = used;
    used += (bytes + 255) / 256 * 256;
    return at;
  }
};

MoeGroupMetadata metadata_at(uint8_t* base, Arena& arena, int64_t groups) {
  auto take = [&](int64_t bytes_per_group) { return base + arena.take(groups * bytes_per_group); };
  MoeGroupMetadata m;
  m.problem = reinterpret_cast<int32_t*>(take(12));
  m.problem_swapped = reinterpret_cast<int32_t*>(take(12));
  m.tokens = reinterpret_cast<void const**>(take(8));
  m.weights = reinterpret_cast<void const**>(take(8));
  m.token_scales = reinterpret_cast<void const**>(take(8));
  m.weight_scales = reinterpret_cast<void const**>(take(8));
  m.output = reinterpret_cast<void**>(take(8));
  m.token_stride = reinterpret_cast<int64_t*>(take(8));
  m.weight_stride = reinterpret_cast<int64_t*>(take(8));
  m.output_stride = reinterpret_cast<int64_t*>(take(8));
  m.token_scale_layout = reinterpret_cast<MoeScaleLayout*>(take(sizeof(MoeScaleLayout)));
  m.weight_scale_layout = reinterpret_cast<MoeScaleLayout*>(take(sizeof(MoeScaleLayout)));
  return m;
}

MoeWorkspace place(MoeLayer const& layer, Buffers& buffers) {
  int64_t const slots = int64_t(layer.num_tokens) * layer.top_k, groups = layer.num_local_experts;
  int64_t const hidden = layer.hidden_size, inter = layer.intermediate_size;
  int64_t const value_bytes = row_value_bytes(layer), scale_bytes = layer.tokens == MOE_TOKENS_FP8_BLOCK ? 4 : 0; // of an element, of a block
  Arena arena;
  MoeWorkspace w{};
  w.topk_ids = arena.take(slots * 4);
  w.topk_weights = arena.take(slots * 4);
  w.expert_offsets = arena.take((2 * groups + 3) * 4); // and behind them what GEMMs count
  w.permuted_row = arena.take(slots * 4);
  w.row_origins = arena.take(slots * sizeof(MoeRowOrigin));
  w.rows = arena.take(slots * hidden * value_bytes);
  w.row_scales = arena.take(slots * hidden / kBlock * scale_bytes);
  w.gemm1_output = arena.take(slots * gemm1_width(layer) * 2);
  w.activation = arena.take(slots * inter * value_bytes);
  w.activation_scales = arena.take(slots * inter / kBlock * scale_bytes);
  w.gemm2_output = arena.take(slots * hidden * 2);
  w.metadata = arena.used;
  auto* const base = static_cast<uint8_t*>(layer.workspace);
  buffers.gemm1 = metadata_at(base, arena, groups);
  buffers.gemm2 = metadata_at(base, arena, groups);
  w.gemm_workspace = arena.take(MOE_GEMM_WORKSPACE_BYTES(layer.sm_count));
  w.total_bytes = arena.used;

  buffers.expert_offsets = reinterpret_cast<int32_t*>(base + w.expert_offsets);
  buffers.tiles_taken = buffers.expert_offsets + groups + 1;
  buffers.activations_done = buffers.tiles_taken + 2;
  buffers.permuted_row = reinterpret_cast<int32_t*>(base + w.permuted_row);
  buffers.row_origins = reinterpret_cast<MoeRowOrigin*>(base + w.row_origins);
  buffers.rows = base + w.rows;
  buffers.row_scales = reinterpret_cast<float*>(base + w.row_scales);
  buffers.gemm1_output = reinterpret_cast<__nv_bfloat16*>(base + w.gemm1_output);
  buffers.activation = base + w.activation;
  buffers.activation_scales = reinterpret_cast<float*>(base + w.activation_scales);
  buffers.gemm2_output = reinterpret_cast<__nv_bfloat16*>(base + w.gemm2_output);
  buffers.gemm_workspace = base + w.gemm_workspace;
  return w;
}

constexpr int kLongestOtherBlock = 32; // of mxfp8

// fp8_block weights and tokens go together, without relu^2; weights packed for fp8 tokens are with those; all others combine
// freely.
bool encodings_fit(MoeLayer const& layer) {
  bool const known = layer.weights >= MOE_WEIGHTS_FP8_BLOCK && layer.weights <= MOE_WEIGHTS_FP8_MXFP4 &&
                     layer.tokens >= MOE_TOKENS_FP8_BLOCK && layer.tokens <= MOE_TOKENS_NVFP4;
  bool const fp8_weights = layer.weights == MOE_WEIGHTS_FP8_BLOCK, fp8_tokens = layer.tokens == MOE_TOKENS_FP8_BLOCK;
  if (keeps_fp8_codes(layer) && layer.tokens != MOE_TOKENS_FP8) return false;
  return known && fp8_weights == fp8_tokens && !(fp8_tokens && layer.activation != MOE_ACTIVATION_SWIGLU);
}

// Tokens come as bf16, or as the codes of the layer's own encoding.
bool takes(MoeLayer const& layer, int32_t hidden_states_dtype) {
  if (hidden_states_dtype == MOE_DTYPE_BF16) return true;
  int32_t const codes = layer.tokens == MOE_TOKENS_NVFP4 ? MOE_DTYPE_E2M1 : MOE_DTYPE_E4M3;
  return layer.tokens != MOE_TOKENS_BF16 && hidden_states_dtype == codes;
}

// Rows are read 16 bytes at a time. Tokens of other encodings than these two have factors that lie as their codes do.
bool strides_fit(MoeLayer const& layer) {
  int64_t const stride = layer.hidden_states_stride;
  if (stride == layer.hidden_size) return true;
  bool const bf16 = layer.hidden_states_dtype == MOE_DTYPE_BF16;
  return stride > layer.hidden_size && stride % (bf16 ? 8 : 16) == 0 && (bf16 || layer.tokens == MOE_TOKENS_FP8_BLOCK);
}

bool messages_fit(MoeLayer const& layer) {
  MoeMessages const& m = layer.messages;
  if (!m.rows) return true;
  bool const fp8_block = layer.tokens == MOE_TOKENS_FP8_BLOCK;
  int64_t const row = fp8_block ? layer.hidden_size / kBlock * (kBlock + 4) : 2 * layer.hidden_size;
  bool const known = fp8_block || layer.tokens == MOE_TOKENS_BF16;
  if (layer.stages != (MOE_STAGE_PERMUTE | MOE_STAGE_GATHER) || m.experts_per_rank < 0) return false;
  return known && m.pitch % 16 == 0 && m.pitch >= row + 8 * m.slots && m.slots >= 0;
}

bool can_route(MoeLayer const& layer) {
  if (layer.num_fused_shared_experts < 0 || layer.num_fused_shared_experts >= layer.top_k) return false;
  switch (layer.routing_method) {
    case MOE_ROUTING_DEFAULT:
    case MOE_ROUTING_RENORMALIZE:
    case MOE_ROUTING_RENORMALIZE_NAIVE:
    case MOE_ROUTING_SIGMOID_RENORM:
    case MOE_ROUTING_MINIMAX2: return layer.n_group == 1;
    case MOE_ROUTING_DEEPSEEK_V3: return layer.n_group >= 1 && layer.n_group <= 32;
    case MOE_ROUTING_LLAMA4: return layer.top_k == 1;
    default: return false;
  }
}

bool can_implement(MoeLayer const& layer) {
  // Kernels index 16-byte units with 32 bits.
  int64_t const most_units = int64_t(layer.num_tokens) * layer.top_k * max(layer.hidden_size, layer.intermediate_size) / 8;
  int const multiple = layer.tokens == MOE_TOKENS_FP8_BLOCK ? kBlock : kLongestOtherBlock;
  return layer.num_tokens >= 0 && encodings_fit(layer) && can_route(layer) &&
         layer.hidden_size > 0 && layer.hidden_size % multiple == 0 &&
         layer.intermediate_size > 0 && layer.intermediate_size % multiple == 0 &&
         layer.top_k >= 1 && layer.top_k <= kMaxTopK && layer.top_k <= layer.num_experts &&
         layer.num_experts <= kMaxExperts && layer.num_local_experts >= 1 && layer.num_local_experts <= kMaxGroups && layer.sm_count > 0 &&
         layer.local_expert_offset >= 0 && layer.local_expert_offset + layer.num_local_experts <= layer.num_experts &&
         most_units < INT_MAX;
}

int64_t slots(MoeLayer const& layer) { return int64_t(layer.num_tokens) * layer.top_k; }

// Whether GEMM2 starts on experts whose activations are there while GEMM1 has tiles of others left: 1 to 2.5 % of a layer of
// 128 to 2048 tokens. The unswapped kernels of our own can: of few rows, whose time is memory's, as many were 0.5 % slower.
// PERMUTE sets what they count by.
bool gemms_overlap(MoeLayer const& layer, MoeVariant const& gemm1, MoeVariant const& gemm2) {
  int32_t const stages = MOE_STAGE_PERMUTE | MOE_STAGE_GEMM1 | MOE_STAGE_GEMM2;
  bool const can = layer.weights == MOE_WEIGHTS_FP8_BLOCK && gemm1.swiglu && !gemm1.swap_ab && gemm2.combines && !gemm2.swap_ab;
  return can && (layer.stages & stages) == stages;
}

// Whether GEMM1 counts few slots' ids for itself: it then loads weights while what sorts the slots and gathers tokens,
// launched before it, still runs. That must not route, for then it writes the ids.
bool gemm1_counts_slots(MoeLayer const& layer, MoeVariant const& gemm1) {
  int32_t const stages = MOE_STAGE_PERMUTE | MOE_STAGE_GATHER | MOE_STAGE_GEMM1;
  return gemm1.swap_ab && (layer.stages & stages) == stages && !permutes_by_cluster(layer) && !routes_while_permuting(layer);
}

// What GEMMs of a layer have in common.
MoeGemmOperands gemm_operands(MoeLayer const& layer, Buffers const& b) {
  MoeGemmOperands o{};
  o.expert_offsets = b.expert_offsets;
  o.row_origins = b.row_origins;
  o.max_rows = slots(layer);
  o.encoding = layer.tokens;
  return o;
}

int32_t run_gemm1(MoeLayer const& layer, MoeVariant const& variant, Buffers const& b, bool overlaps) {
  bool const fp8_block = layer.weights == MOE_WEIGHTS_FP8_BLOCK;
  // Packed gate_up lies as the kernels need it that activate.
  bool const must_activate = !fp8_block && layer.activation == MOE_ACTIVATION_SWIGLU;
  if (variant.combines || variant.weights != layer.weights || (must_activate && !variant.swiglu)) return MOE_ERROR_BAD_VARIANT;
  MoeGemmOperands o = gemm_operands(layer, b);
  o.tokens = b.rows;
  o.token_scales = fp8_block ? b.row_scales : nullptr;
  o.weights = layer.gemm1_weights;
  o.weight_scales = fp8_block ? layer.gemm1_weights_scale : layer.gemm1_scale;
  o.tiles_taken = b.tiles_taken;
  o.topk_ids = gemm1_counts_slots(layer, variant) ? layer.topk_ids : nullptr;
  o.local_expert_offset = layer.local_expert_offset;
  o.output_done = overlaps ? b.activations_done : nullptr;
  o.output = variant.swiglu ? static_cast<void*>(b.activation) : b.gemm1_output;
  o.output_scales = variant.swiglu ? b.activation_scales : nullptr;
  o.gate_first = layer.gate_first;
  o.clamp_limit = layer.clamp_limit;
  o.bias = layer.gemm1_bias;
  o.alpha = layer.alpha;
  o.beta = layer.beta;
  o.clamp = layer.clamp;
  o.activation_multiplier = layer.activation_multiplier;
  MoeGroupedGemm const gemm{layer.num_local_experts, gemm1_width(layer), layer.hidden_size, layer.sm_count, o, b.gemm1, b.gemm_workspace, layer.stream};
  return variant.run(&gemm);
}

int32_t run_gemm2(MoeLayer const& layer, MoeVariant const& variant, Buffers const& b, bool overlaps) {
  if (variant.swiglu || variant.gathers || variant.weights != layer.weights) return MOE_ERROR_BAD_VARIANT;
  bool const fp8_block = layer.weights == MOE_WEIGHTS_FP8_BLOCK;
  MoeGemmOperands o = gemm_operands(layer, b);
  o.tokens = b.activation;
  o.token_scales = fp8_block ? b.activation_scales : nullptr;
  o.weights = layer.gemm2_weights;
  o.weight_scales = fp8_block ? layer.gemm2_weights_scale : layer.gemm2_scale;
  o.tiles_taken = b.tiles_taken + 1;
  o.tokens_done = overlaps ? b.activations_done : nullptr;
  o.output = variant.combines ? layer.output : b.gemm2_output;
  o.offsets_ready = (layer.stages & MOE_STAGE_GEMM1) != 0;  // GEMM1 waits for the permutation before it lets its successor start
  o.bias = layer.gemm2_bias;
  MoeGroupedGemm const gemm{layer.num_local_experts, layer.hidden_size, layer.intermediate_size, layer.sm_count, o, b.gemm2, b.gemm_workspace, layer.stream};
  return variant.run(&gemm);
}

int32_t run_stages(MoeLayer const& layer, Buffers& buffers) {
  MoeVariant const* const gemm1 = moe_variant(layer.gemm1_variant);
  MoeVariant const* const gemm2 = moe_variant(layer.gemm2_variant);
  if (!gemm1 || !gemm2) return MOE_ERROR_BAD_VARIANT;
  int32_t status = 0, left = layer.stages;
  if (gemm1->swiglu) left &= ~MOE_STAGE_ACTIVATION;
  if (gemm2->combines) {
    if ((left & MOE_STAGE_GEMM2) && !(left & MOE_STAGE_COMBINE)) return MOE_ERROR_BAD_VARIANT; // it leaves no rows
    left &= ~MOE_STAGE_COMBINE;
  }
  buffers.rows_by_token = gemm1->gathers;
  // While one cluster permutes, the other SMs can write zeros; not over tokens that are still to be read.
  bool const early = (left & MOE_STAGE_PERMUTE) && permutes_by_cluster(layer) && layer.output != layer.hidden_states;
  auto* const sum = gemm2->combines ? static_cast<__nv_bfloat16*>(layer.output) : nullptr;
  buffers.zeroed_by_permute = early ? sum : nullptr;
  buffers.zeroed_by_gather = early ? nullptr : sum;
  // Runs stages if the call wants all of them and none has run yet.
  auto run = [&](int32_t stages, auto function) {
    if (status != 0 || (left & stages) != stages) return;
    status = function();
    left &= ~stages;
  };
  bool const messages = layer.messages.rows, overlap = gemms_overlap(layer, *gemm1, *gemm2);
  if (messages) status = reach(layer);
  run(MOE_STAGE_ROUTE | MOE_STAGE_PERMUTE | MOE_STAGE_GATHER, [&] { return int32_t(route_permute_and_gather(layer, buffers)); });
  run(MOE_STAGE_ROUTE, [&] { return int32_t(route(layer)); });
  run(MOE_STAGE_PERMUTE | MOE_STAGE_GATHER, [&] { return int32_t(permute_and_gather(layer, buffers)); });
  run(MOE_STAGE_PERMUTE, [&] { return int32_t(permute(layer, buffers)); });
  run(MOE_STAGE_GATHER, [&] { return int32_t(gather(layer, buffers)); });
  if (messages && layer.messages.notice && status == 0) status = notify(layer, buffers);
  run(MOE_STAGE_GEMM1, [&] { return run_gemm1(layer, *gemm1, buffers, overlap); });
  run(MOE_STAGE_ACTIVATION, [&] { return int32_t(activate(layer, buffers)); });
  run(MOE_STAGE_GEMM2, [&] { return run_gemm2(layer, *gemm2, buffers, overlap); });
  run(MOE_STAGE_COMBINE, [&] { return int32_t(combine(layer, buffers)); });
  return status;
}

}  // namespace
}  // namespace moe

extern "C" int32_t moe_layer_workspace(MoeLayer const* layer, MoeWorkspace* workspace) {
  if (!moe::can_implement(*layer)) return MOE_ERROR_CANNOT_IMPLEMENT;
  moe::Buffers buffers;
  *workspace = moe::place(*layer, buffers);
  return 0;
}

extern "C" int32_t moe_layer(MoeLayer const* layer) {
  if (!moe::can_implement(*layer)) return MOE_ERROR_CANNOT_IMPLEMENT;
  if (!moe::takes(*layer, layer->hidden_states_dtype) || !moe::strides_fit(*layer) || !moe::messages_fit(*layer)) return MOE_ERROR_BAD_ARGUMENT;
  if (layer->num_tokens == 0) return 0;
  moe::Buffers buffers;
  MoeWorkspace const regions = moe::place(*layer, buffers);
  if (regions.total_bytes > layer->workspace_bytes) return MOE_ERROR_WORKSPACE_TOO_SMALL;
  MoeLayer call = *layer;
  auto* const base = static_cast<uint8_t*>(call.workspace);
  if (!call.topk_ids) call.topk_ids = reinterpret_cast<int32_t*>(base + regions.topk_ids);
  if (!call.topk_weights) call.topk_weights = reinterpret_cast<float*>(base + regions.topk_weights);
  return moe::run_stages(call, buffers);
}

extern "C" char const* moe_error_string(int32_t code) {
  switch (code) {
    case 0: return "no error";
    case MOE_ERROR_BAD_VARIANT: return "no such variant for these weights in this library";
    case MOE_ERROR_WORKSPACE_TOO_SMALL: return "the workspace is too small";
    case MOE_ERROR_CANNOT_IMPLEMENT: return "the shape is outside what the kernels implement";
    case MOE_ERROR_BAD_ARGUMENT: return "a combination of arguments that no kernel serves";
    default: return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}
