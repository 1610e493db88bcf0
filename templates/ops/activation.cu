// gemm1_output -> SwiGLU or relu^2 -> rows in the layer's token encoding. The number of rows is known on the device only,
// so a grid of the card's size strides over them.
#include "ops.cuh"

namespace moe {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;

struct ActivationParams {
  __nv_bfloat16 const* gemm1_output;
  int32_t const* expert_offsets;
  float const *alpha, *beta, *clamp, *multiplier; // [num_experts] or null
  Rows rows;
  int num_experts, gemm1_width, gate_column, up_column;
  float clamp_limit;
};

// The factors of one expert.
struct Factors : SwigluFactors {
  float multiplier = 1.0f;
};

// The local expert of each lane's row, where it has one. Must be reached by whole warps, whose rows rise with the lane. The
// expert of the first is counted by all lanes together, the others are the same or near: a binary search by each would be
// a chain of dependent loads.
__device__ __forceinline__ int expert_of_row(ActivationParams const& p, int row, bool valid) {
  int const first_row = __shfl_sync(kAllLanes, row, 0);
  int before = 0;
  for (int e = threadIdx.x % 32; e < p.num_experts; e += 32) before += p.expert_offsets[e + 1] <= first_row;
  int expert = __reduce_add_sync(kAllLanes, before);
  while (valid && p.expert_offsets[expert + 1] <= row) ++expert;
  return expert;
}

template <MoeTokens kTokens>
__device__ __forceinline__ Factors factors_of_row(ActivationParams const& p, int row, bool valid) {
  Factors f{{p.clamp_limit}};
  if constexpr (kTokens != MOE_TOKENS_FP8_BLOCK) {
    if (!p.alpha && !p.beta && !p.clamp && !p.multiplier) return f;
    int const expert = expert_of_row(p, row, valid);
    if (!valid) return f;
    if (p.alpha) f.alpha = p.alpha[expert];
    if (p.beta) f.beta = p.beta[expert];
    if (p.clamp) f.clamp_limit = p.clamp[expert];
    if (p.multiplier) f.multiplier = p.multiplier[expert];
  }
  return f;
}

template <MoeTokens kTokens, MoeActivation kActivation>
__global__ void __launch_bounds__(kThreads) activation_kernel(ActivationParams p) {
  allow_successor_to_start();
  wait_for_predecessor();
  int const chunks = p.rows.width / kValuesPerThread;
  int const units = p.expert_offsets[p.num_experts] * chunks;
  // A block of values is never divided between warps, so a warp's last trip can be ragged only between blocks; whole
  // warps take part in the shuffles all the same.
  for (int base = blockIdx.x * kThreads; base < units; base += gridDim.x * kThreads) {
    int const unit = base + threadIdx.x;
    bool const valid = unit < units;
    int const chunk = unit % chunks, row = unit / chunks;
    auto const* const source = p.gemm1_output + int64_t(row) * p.gemm1_width + chunk * kValuesPerThread;
    Values values = {}, up = {};
    if (valid) {
      load_bf16x16(source + p.gate_column, values);
      if constexpr (kActivation == MOE_ACTIVATION_SWIGLU) load_bf16x16(source + p.up_column, up);
    }
    Factors const f = factors_of_row<kTokens>(p, row, valid);
    if constexpr (kActivation == MOE_ACTIVATION_RELU2) {
#pragma unroll
      for (int i = 0; i < kValuesPerThread; ++i) {
        float const positive = fmaxf(values[i], 0.0f);
        values[i] = positive * positive;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kValuesPerThread; ++i) {
        if constexpr (kTokens == MOE_TOKENS_FP8_BLOCK) {
          values[i] = swiglu(values[i], up[i], f.clamp_limit);
        } else {
          values[i] = swiglu(values[i], up[i], f);
        }
      }
    }
    if constexpr (kTokens != MOE_TOKENS_FP8_BLOCK) {
#pragma unroll
      for (int i = 0; i < kValuesPerThread; ++i) values[i] *= f.multiplier;
    }
    Piece<kTokens> const piece = encode16<kTokens>(values);
    if (valid) piece.store(p.rows, row, chunk);
  }
}

}  // namespace

cudaError_t activate(MoeLayer const& layer, Buffers const& b) {
  int const inter = layer.intermediate_size;
  bool const gated = layer.activation == MOE_ACTIVATION_SWIGLU;
  ActivationParams const p{b.gemm1_output, b.expert_offsets, layer.alpha, layer.beta, layer.clamp, layer.activation_multiplier,
                           adjacent_rows(b.activation, b.activation_scales, inter), layer.num_local_experts, gemm1_width(layer),
                           gated && !layer.gate_first ? inter : 0, layer.gate_first ? inter : 0, layer.clamp_limit};
  int const most = ceil_div(layer.num_tokens * layer.top_k * (inter / kValuesPerThread), kThreads);
  return with_tokens(layer, [&](auto tokens) {
    auto kernel = activation_kernel<tokens.value, MOE_ACTIVATION_SWIGLU>;
    if constexpr (tokens.value != MOE_TOKENS_FP8_BLOCK) {
      if (!gated) kernel = activation_kernel<tokens.value, MOE_ACTIVATION_RELU2>;
    }
    return launch(kernel, min(most, layer.sm_count * kBlocksPerSm), kThreads, 0, layer.stream, p);
  });
}

}  // namespace moe
