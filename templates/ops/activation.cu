// gemm1_output -> SwiGLU -> e4m3 rows with 1x128 scales. The number of rows is known on the device only, so a grid
// of the card's size strides over them.
#include "ops.cuh"

namespace moe {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;

struct ActivationParams {
  __nv_bfloat16 const* gemm1_output;
  int32_t const* num_rows;
  uint8_t* activation;
  float* scales;
  int intermediate_size, gate_column, up_column;
  float clamp_limit;
};

__global__ void __launch_bounds__(kThreads) activation_kernel(ActivationParams p) {
  allow_successor_to_start();
  wait_for_predecessor();
  int const chunks = p.intermediate_size / kValuesPerThread;
  int const units = *p.num_rows * chunks;
  // chunks is a multiple of eight lanes, so a warp's last trip can be ragged only between blocks; whole warps
  // take part in the shuffles all the same.
  for (int base = blockIdx.x * kThreads; base < units; base += gridDim.x * kThreads) {
    int const unit = base + threadIdx.x;
    bool const valid = unit < units;
    int const chunk = unit % chunks;
    int64_t const row = unit / chunks;
    float gate[kValuesPerThread] = {}, up[kValuesPerThread] = {};
    if (valid) {
      auto const* source = p.gemm1_output + row * 2 * p.intermediate_size + chunk * kValuesPerThread;
      load_bf16x8(source + p.gate_column, gate);
      load_bf16x8(source + p.gate_column + 8, gate + 8);
      load_bf16x8(source + p.up_column, up);
      load_bf16x8(source + p.up_column + 8, up + 8);
    }
#pragma unroll
    for (int i = 0; i < kValuesPerThread; ++i) gate[i] = swiglu(gate[i], up[i], p.clamp_limit);
    float scale;
    uint4 const packed = quantise_block(gate, scale);
    if (!valid) continue;
    *reinterpret_cast<uint4*>(p.activation + row * p.intermediate_size + chunk * kValuesPerThread) = packed;
    if (chunk % kLanesPerBlock == 0) p.scales[row * (p.intermediate_size / kBlock) + chunk / kLanesPerBlock] = scale;
  }
}

}  // namespace

cudaError_t activate(MoeFp8BlockLayer const& layer, Buffers const& b) {
  int const inter = layer.intermediate_size;
  ActivationParams const p{b.gemm1_output, b.expert_offsets + layer.num_local_experts, b.activation, b.activation_scales, inter,
                           layer.gate_first ? 0 : inter, layer.gate_first ? inter : 0, layer.clamp_limit};
  int const most = ceil_div(layer.num_tokens * layer.top_k * (inter / kValuesPerThread), kThreads);
  return launch(activation_kernel, min(most, layer.sm_count * kBlocksPerSm), kThreads, 0, layer.stream, p);
}

}  // namespace moe
