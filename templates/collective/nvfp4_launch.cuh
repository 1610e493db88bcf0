// NVFP4 on a collective: the run and check_abi of a MoeNvfp4Variant.
#pragma once
#include "abi_nvfp4.h"
#include "collective/launch.cuh"

namespace moe {

template <class Kernel, bool kSwapAB>
struct Nvfp4Launch : CollectiveLaunch<Kernel, kSwapAB> {
  using Base = CollectiveLaunch<Kernel, kSwapAB>;
  using ScaleConfig = typename Kernel::CollectiveMainloop::Sm1xxBlkScaledConfig;

  static_assert(sizeof(typename Kernel::CollectiveMainloop::ElementSF) == 1 && ScaleConfig::SFVecSize == 16);

  static int32_t run(MoeNvfp4GroupedGemm const* gemm) {
    auto args = Base::arguments(gemm->metadata.group, gemm->num_groups, gemm->sm_count);
    args.epilogue.thread.alpha_ptr_array = gemm->metadata.alpha;
    args.epilogue.thread.dAlpha = {cute::_0{}, cute::_0{}, 1};
    if (int32_t status = Base::check(args, gemm->sm_count)) return status;
    return Base::launch(Kernel::to_underlying_arguments(args, gemm->workspace), gemm->stream);
  }

  static int32_t check_abi() {
    int const m = 640, n = 384, k = 896, k_blocks = (k + 63) / 64;
    auto const shape = cute::make_shape(m, n, k, 1);
    auto expected = [&](int rows) {
      int const blocks = (rows + 127) / 128;
      return MoeScaleLayout{blocks, k_blocks, 1, k_blocks * 512, blocks * k_blocks * 512};
    };
    typename Base::LayoutSFA const layout_a = ScaleConfig::tile_atom_to_shape_SFA(shape);
    typename Base::LayoutSFB const layout_b = ScaleConfig::tile_atom_to_shape_SFB(shape);
    bool ok = same_bytes(layout_a, expected(m)) && same_bytes(layout_b, expected(n));
    for (int row = 0; row < m; row += 7) {
      for (int column = 0; column < k; column += 16) ok = ok && layout_a(row, column, 0) == moe_nvfp4_scale_offset(row, column / 16, k_blocks);
    }
    return ok && Base::strides_match() ? 0 : MOE_ERROR_BAD_ARGUMENT;
  }
};

}  // namespace moe
