// templates/mixed/decode.cuh for the host: the kernel's own arithmetic, one thread of one slice at a time.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __host__
#define __device__
#define __forceinline__ inline
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };

namespace moe::mixed {

float from_bf16(uint32_t bits) {
  uint32_t const wide = bits << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Round to nearest, ties to even, subnormals kept: as mul.bf16x2.
uint32_t to_bf16(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  return (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
}

template <int kHalf>
uint32_t multiply(uint32_t values, uint32_t factors) {
  float const factor = from_bf16(factors >> 16 * kHalf & 0xFFFF);
  return to_bf16(from_bf16(values & 0xFFFF) * factor) | to_bf16(from_bf16(values >> 16) * factor) << 16;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t choose_bytes(uint32_t low, uint32_t high, uint32_t places) {
  uint64_t const both = uint64_t(high) << 32 | low;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t const place = places >> 4 * i & 15;
    if (place > 7) std::abort();  // prmt would repeat a sign
    chosen |= uint32_t(both >> 8 * place & 0xFF) << 8 * i;
  }
  return chosen;
}

}  // namespace moe::mixed

#include "mixed/decode.cuh"

// slice -> out [256 threads][4 steps][4 registers].
template <class Weights>
static int decode(uint8_t const* slice, uint32_t* out) {
  for (int thread = 0; thread < 256; ++thread) {
    Weights weights;
    weights.load(slice, thread);
    for (int step = 0; step < moe::mixed::kSliceSteps; ++step, out += 4) {
      uint32_t a[4];
      weights.fragment(step, a);
      std::memcpy(out, a, sizeof a);
    }
  }
  return Weights::kSliceBytes;
}

// slice -> out as above and factors [256 threads][2 rows].
extern "C" int fp8_mxfp4(uint8_t const* slice, uint32_t* out, float* factors) {
  moe::mixed::Magnitudes table[moe::mixed::kDistances];
  for (int distance = 0; distance < moe::mixed::kDistances; ++distance) table[distance] = moe::mixed::magnitudes(distance);
  for (int thread = 0; thread < 256; ++thread) {
    moe::mixed::Fp8Mxfp4 weights;
    weights.load(slice, thread);
    for (int half = 0; half < 2; ++half) *factors++ = weights.factor(half);
    for (int step = 0; step < moe::mixed::kSliceSteps; ++step, out += 4) {
      uint32_t a[4];
      weights.fragment(table, step, a);
      std::memcpy(out, a, sizeof a);
    }
  }
  return moe::mixed::Fp8Mxfp4::kSliceBytes;
}

extern "C" int mxfp4(uint8_t const* slice, uint32_t* out) { return decode<moe::mixed::Mxfp4>(slice, out); }
extern "C" int nvfp4(uint8_t const* slice, uint32_t* out) { return decode<moe::mixed::Nvfp4>(slice, out); }
extern "C" int bf16(uint8_t const* slice, uint32_t* out) { return decode<moe::mixed::Bf16>(slice, out); }
