// hidden_states -> rows grouped by expert, in the layer's token encoding. A token is read and encoded once and written to
// each of its local slots' rows; tokens without a local slot are not read at all.
#include "gather.cuh"

namespace moe {
namespace {

// 256 and no bound on registers: 40 of them, spilled.
constexpr int kThreads = 128, kBlocksPerSm = 10;

template <MoeTokens kTokens>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) gather_kernel(GatherParams p, int32_t const* permuted_row) {
  allow_successor_to_start();
  wait_for_predecessor();
  int const unit = blockIdx.x * kThreads + threadIdx.x;
  gather_unit<kTokens>(p, unit, permuted_row, [&](bool local) { return encode_unit<kTokens>(p, unit, local, p.input_weights); });
}

}  // namespace

cudaError_t gather(MoeLayer const& layer, Buffers const& b) {
  return with_tokens(layer, [&](auto tokens) {
    return launch(gather_kernel<tokens.value>, ceil_div(gather_units(layer), kThreads), kThreads, 0, layer.stream, gather_params(layer, b), b.permuted_row);
  });
}

}  // namespace moe
