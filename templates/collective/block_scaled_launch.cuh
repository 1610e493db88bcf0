// Block-scaled operands on a collective: the run and check_abi of a MoeBlockScaledVariant.
#pragma once
#include "abi_block_scaled.h"
#include "collective/launch.cuh"

namespace moe {

template <class Kernel, bool kSwapAB>
struct BlockScaledLaunch : CollectiveLaunch<Kernel, kSwapAB> {
  using Base = CollectiveLaunch<Kernel, kSwapAB>;
  using ScaleConfig = typename Kernel::CollectiveMainloop::Sm1xxBlkScaledConfig;

  static constexpr int kFactorElements = ScaleConfig::SFVecSize;

  static_assert(sizeof(typename Kernel::CollectiveMainloop::ElementSF) == 1);

  static int32_t run(MoeBlockScaledGroupedGemm const* gemm) {
    auto args = Base::arguments(gemm->metadata.group, gemm->num_groups, gemm->sm_count);
    args.epilogue.thread.alpha_ptr_array = gemm->metadata.alpha;
    args.epilogue.thread.dAlpha = {cute::_0{}, cute::_0{}, 1};
    if (int32_t status = Base::check(args, gemm->sm_count)) return status;
    return Base::launch(Kernel::to_underlying_arguments(args, gemm->workspace), gemm->stream);
  }

  static int32_t check_abi() {
    // m and k are no multiples of what an atom spans: the padding must agree too.
    int const m = 600, n = 384, k = 928, factors = k / kFactorElements, k_blocks = (factors + 3) / 4;
    auto const shape = cute::make_shape(m, n, k, 1);
    auto matches = [&](auto const& layout, int rows) {
      int const blocks = (rows + 127) / 128;
      bool ok = same_bytes(layout, MoeScaleLayout{blocks, k_blocks, 1, k_blocks * 512, blocks * k_blocks * 512});
      for (int row = 0; row < rows; row += 7) {
        for (int factor = 0; factor < factors; ++factor)
          ok = ok && layout(row, factor * kFactorElements, 0) == moe_scale_factor_offset(row, factor, k_blocks);
      }
      return ok;
    };
    typename Base::LayoutSFA const layout_a = ScaleConfig::tile_atom_to_shape_SFA(shape);
    typename Base::LayoutSFB const layout_b = ScaleConfig::tile_atom_to_shape_SFB(shape);
    return matches(layout_a, m) && matches(layout_b, n) && Base::strides_match() ? 0 : MOE_ERROR_BAD_ARGUMENT;
  }
};

}  // namespace moe
