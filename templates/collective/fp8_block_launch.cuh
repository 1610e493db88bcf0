// fp8_block on a collective: the run and check_abi of a MoeVariant.
#pragma once
#include <cstddef>
#include <optional>

#include "collective/launch.cuh"

namespace moe {

template <class Kernel, class ScaleConfig, bool kSwapAB>
struct Fp8BlockLaunch : CollectiveLaunch<Kernel, kSwapAB> {
  using Base = CollectiveLaunch<Kernel, kSwapAB>;

  // Encoding three tensormaps costs the host more than the launch. The parameters depend on the call's arguments only,
  // not on what the metadata holds, and a server repeats its arguments: the last ones of each thread are kept.
  static int32_t run(MoeGroupedGemm const* gemm) {
    static_assert(offsetof(MoeGroupedGemm, stream) + sizeof(void*) == sizeof(MoeGroupedGemm));
    thread_local MoeGroupedGemm last{};
    thread_local std::optional<typename Kernel::Params> params;
    if (!params || std::memcmp(&last, gemm, offsetof(MoeGroupedGemm, stream)) != 0) {
      auto const args = Base::arguments(gemm->metadata, gemm->num_groups, gemm->sm_count);
      if (int32_t status = Base::check(args, gemm->sm_count)) return status;
      params = Kernel::to_underlying_arguments(args, gemm->workspace);
      last = *gemm;
    }
    return Base::launch(*params, gemm->stream);
  }

  static int32_t check_abi() {
    int const m = 640, n = 384, k = 896, k_blocks = k / 128;
    auto const shape = cute::make_shape(m, n, k, 1);
    auto expected = [&](int rows, int granularity) {
      int const blocks = (rows + granularity - 1) / granularity;
      return MoeScaleLayout{blocks, k_blocks, 1, k_blocks, blocks * k_blocks};
    };
    bool const ok = same_bytes(ScaleConfig::tile_atom_to_shape_SFA(shape), expected(m, kSwapAB ? 128 : 1)) &&
                    same_bytes(ScaleConfig::tile_atom_to_shape_SFB(shape), expected(n, kSwapAB ? 1 : 128));
    return ok && Base::strides_match() ? 0 : MOE_ERROR_BAD_ARGUMENT;
  }
};

}  // namespace moe
