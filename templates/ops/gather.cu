// hidden_states -> e4m3 rows grouped by expert. A token is read and quantised once and written to each of its local
// slots' rows; tokens without a local slot are not read at all.
#include "gather.cuh"

namespace moe {
namespace {

constexpr int kThreads = 256;

template <bool kQuantised>
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherParams p, int32_t const* permuted_row) {
  allow_successor_to_start();
  wait_for_predecessor();
  gather_unit<kQuantised>(p, blockIdx.x * kThreads + threadIdx.x, permuted_row);
}

}  // namespace

cudaError_t gather(MoeFp8BlockLayer const& layer, Buffers const& b) {
  auto kernel = layer.hidden_states_dtype == MOE_DTYPE_E4M3 ? gather_kernel<true> : gather_kernel<false>;
  return launch(kernel, ceil_div(gather_units(layer), kThreads), kThreads, 0, layer.stream, gather_params(layer, b), b.permuted_row);
}

}  // namespace moe
