// Packed weights -> the bf16 fragments that wgmma takes as operand A from registers. Every product of a code and its
// block's factor that bf16 holds comes out exactly.
//
// A slice is 128 rows by 64 of K. Warp w of the eight multiplies rows 16w .. 16w + 15; its lane 4g + t holds, at each of
// four steps of 16 along K, registers r = 0 .. 3: row g + 8 (r % 2), columns 2t + 8 (r / 2) and one more, the earlier in
// the low half. moe_runtime/formats/packing.py lays slices out in that order, so that a thread reads whole words:
//
//   codes    [256 threads][4 steps] words of 8 codes: one 16-byte load a thread
//   factors  [64 pairs of rows g, g + 8] of each warp: mxfp4 1 word, nvfp4 2; the lanes of a quad read the same one
//   bf16     [4 steps][256 threads][4 registers]
//
// An e2m1 code seem whose sign is bit 15 of a bf16 and whose eem are bits 8:6 stands for its value times 2^-126,
// subnormals included. So a register is a word shifted into place and masked. Bit b of a register comes from bit
// b - shift (modulo 32) of the word, with
//   shift(0) = 0, shift(1) = 4, shift(2) = 10, shift(3) = 6 for the mantissa bits 6 and 22, -2 for the others.
// Four fields of this shape do not tile 16 bits, so one of the four is in two parts: 5 logic operations and 4 shifts for
// 8 values, the least there is, and two of the shifts are to the left, which the multipliers can do.
//
// Factors lie so that one mask gives those of rows g and g + 8, each as a bf16 in its half, of which HMUL2 reads either.
#pragma once
#include <stdint.h>

namespace moe::mixed {

constexpr int kSliceRows = 128, kSliceK = 64, kSliceSteps = 4;
constexpr int kCodeBytes = kSliceRows * kSliceK / 2;

#ifdef __CUDACC__
// Two bf16 times the one in the given half of `factors`.
template <int kHalf>
__device__ __forceinline__ uint32_t multiply(uint32_t values, uint32_t factors) {
  uint32_t product;
  if constexpr (kHalf == 0) {
    asm("{.reg .b16 low, high; .reg .b32 both; mov.b32 {low, high}, %2; mov.b32 both, {low, low}; mul.bf16x2 %0, %1, both;}"
        : "=r"(product) : "r"(values), "r"(factors));
  } else {
    asm("{.reg .b16 low, high; .reg .b32 both; mov.b32 {low, high}, %2; mov.b32 both, {high, high}; mul.bf16x2 %0, %1, both;}"
        : "=r"(product) : "r"(values), "r"(factors));
  }
  return product;
}
#endif

__device__ __forceinline__ uint32_t rotate_left(uint32_t word, int bits) { return word << bits | word >> (32 - bits); }

// Values times 2^-126.
__device__ __forceinline__ void place_e2m1(uint32_t word, uint32_t (&a)[4]) {
  constexpr uint32_t kCode = 0x81C081C0u, kMantissa = 0x00400040u;
  a[0] = word & kCode;
  a[1] = word << 4 & kCode;
  a[2] = rotate_left(word, 10) & kCode;
  a[3] = (rotate_left(word, 30) & (kCode ^ kMantissa)) | (word << 6 & kMantissa);
}

__device__ __forceinline__ void multiply_rows(uint32_t (&a)[4], uint32_t factors) {
  a[0] = multiply<0>(a[0], factors);
  a[1] = multiply<1>(a[1], factors);
  a[2] = multiply<0>(a[2], factors);
  a[3] = multiply<1>(a[3], factors);
}

// One thread's part of a slice, read from shared memory. fragment(): operand A of one step.
//
// Factors are stored times 2^126, as the exponent of a bf16, which takes the codes' 2^-126 back. That leaves room for
// factors of up to 2; packing divides by what larger ones exceed it.
struct Mxfp4 {
  static constexpr bool kDecodes = true;
  static constexpr int kSliceBytes = kCodeBytes + kSliceRows * 2;
  static constexpr float kScale = 1.0f;  // of a product with fragments, for one with the weights
  uint32_t codes[kSliceSteps], factors;

  __device__ __forceinline__ void load(uint8_t const* slice, int thread) {
    uint4 const four = reinterpret_cast<uint4 const*>(slice)[thread];
    codes[0] = four.x, codes[1] = four.y, codes[2] = four.z, codes[3] = four.w;
    factors = reinterpret_cast<uint32_t const*>(slice + kCodeBytes)[thread / 4];
  }
  __device__ __forceinline__ void fragment(int step, uint32_t (&a)[4]) const {
    constexpr uint32_t kFactor = 0x7F807F80u;
    place_e2m1(codes[step], a);
    multiply_rows(a, (step < 2 ? factors : rotate_left(factors, 8)) & kFactor);
  }
};

// Factors are stored as 5 bits of exponent, 3 of mantissa: e4m3 without its subnormals. Bits 14:12 set, they are the
// factor times 2^118 as a bf16, which leaves 2^-8 of the codes' 2^-126. A zero factor is stored as zero codes.
struct Nvfp4 {
  static constexpr bool kDecodes = true;
  static constexpr int kSliceBytes = kCodeBytes + kSliceRows * 4;
  static constexpr float kScale = 256.0f;
  uint32_t codes[kSliceSteps], factors[2];

  __device__ __forceinline__ void load(uint8_t const* slice, int thread) {
    uint4 const four = reinterpret_cast<uint4 const*>(slice)[thread];
    codes[0] = four.x, codes[1] = four.y, codes[2] = four.z, codes[3] = four.w;
    uint2 const two = reinterpret_cast<uint2 const*>(slice + kCodeBytes)[thread / 4];
    factors[0] = two.x, factors[1] = two.y;
  }
  __device__ __forceinline__ void fragment(int step, uint32_t (&a)[4]) const {
    constexpr uint32_t kFactor = 0x0FF00FF0u, kExponent = 0x70007000u;
    uint32_t const pairs = step % 2 == 0 ? factors[step / 2] : rotate_left(factors[step / 2], 8);
    place_e2m1(codes[step], a);
    multiply_rows(a, (pairs & kFactor) | kExponent);
  }
};

struct Bf16 {
  static constexpr bool kDecodes = false;
  static constexpr int kSliceBytes = kSliceRows * kSliceK * 2;
  static constexpr float kScale = 1.0f;
  uint4 steps[kSliceSteps];

  __device__ __forceinline__ void load(uint8_t const* slice, int thread) {
#pragma unroll
    for (int step = 0; step < kSliceSteps; ++step) steps[step] = reinterpret_cast<uint4 const*>(slice)[step * 256 + thread];
  }
  __device__ __forceinline__ void fragment(int step, uint32_t (&a)[4]) const {
    a[0] = steps[step].x, a[1] = steps[step].y, a[2] = steps[step].z, a[3] = steps[step].w;
  }
};

}  // namespace moe::mixed
