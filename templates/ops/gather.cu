// hidden_states -> rows grouped by expert, in the layer's token encoding. A token is read and encoded once and written to
// each of its local slots' rows; tokens without a local slot are not read at all.
#include "gather.cuh"

namespace moe {
namespace {

constexpr int kThreads = 128;

template <MoeTokens kTokens>
__global__ void __launch_bounds__(kThreads, 10) gather_kernel(GatherParams p, int32_t const* permuted_row) {
  allow_successor_to_start();
  wait_for_predecessor();
  gather_unit<kTokens>(p, blockIdx.x * kThreads + threadIdx.x, permuted_row, p.input_weights);
}

}  // namespace

cudaError_t gather(MoeLayer const& layer, Buffers const& b) {
  return with_tokens(layer.tokens, [&](auto tokens) {
    return launch(gather_kernel<tokens.value>, ceil_div(gather_units(layer), kThreads), kThreads, 0, layer.stream, gather_params(layer, b), b.permuted_row);
  });
}

}  // namespace moe
