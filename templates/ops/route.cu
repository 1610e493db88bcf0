// Router logits -> top_k expert ids and weights: one warp a token.
#include "route.cuh"

namespace moe {
namespace {

constexpr int kWarps = 4;

template <int kItems>
__global__ void __launch_bounds__(kWarps * 32) route_kernel(RouteParams p) {
  extern __shared__ float choice[]; // [kWarps, num_experts]
  allow_successor_to_start();
  wait_for_predecessor();
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int const token = blockIdx.x * kWarps + warp;
  if (token >= p.num_tokens) return;
  store_slot(p, token, route_token<kItems>(p, token, choice + warp * p.num_experts, lane), lane);
}

}  // namespace

cudaError_t route(MoeLayer const& layer) {
  int const items = ceil_div(layer.num_experts, 32);
  auto kernel = items <= 4 ? route_kernel<4> : items <= 8 ? route_kernel<8> : items <= 16 ? route_kernel<16> : route_kernel<32>;
  return launch(kernel, ceil_div(layer.num_tokens, kWarps), kWarps * 32, kWarps * layer.num_experts * sizeof(float), layer.stream, route_params(layer));
}

}  // namespace moe
