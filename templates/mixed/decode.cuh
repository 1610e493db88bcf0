// Packed weights -> the fragments that wgmma takes as operand A from registers: e4m3 where tokens are, else bf16. Every
// product of a code and its block's factor that bf16 holds comes out exactly; of e4m3 see below.
//
// A slice of the latter is 128 rows by 64 of K. Warp w of the eight multiplies rows 16w .. 16w + 15; its lane 4g + t holds, at each of
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

constexpr int kSliceRows = 128, kSliceSteps = 4;

// K of a slice of bf16 tokens, and the bytes of its codes.
constexpr int kBf16SliceK = 64, kCodeBytes = kSliceRows * kBf16SliceK / 2;

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

// Byte i is the one of `low` and `high`, eight in all, that nibble i of `places` counts. Unlike __byte_perm it takes the
// nibbles' highest bits to be 0.
__device__ __forceinline__ uint32_t choose_bytes(uint32_t low, uint32_t high, uint32_t places) {
  uint32_t chosen;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(chosen) : "r"(low), "r"(high), "r"(places));
  return chosen;
}

__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
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
  static constexpr bool kDecodes = true, kFp8 = false;
  static constexpr int kSliceK = kBf16SliceK;
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
  static constexpr bool kDecodes = true, kFp8 = false;
  static constexpr int kSliceK = kBf16SliceK;
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
  static constexpr bool kDecodes = false, kFp8 = false;
  static constexpr int kSliceK = kBf16SliceK;
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

// For e4m3 tokens. A slice is 128 rows by 128 of K, in four steps of 32 along K, each of which has one factor a row. Register
// r of step s: row g + 8 (r % 2), columns 32 s + 16 (r / 2) + 4t and three more.
//
//   codes    [2 pairs of steps][256 threads][2 steps][2 rows] words of 8 codes, of both registers of a row
//   factors  [128 rows] words, g beside g + 8
//
// A code's magnitude chooses a byte among the eight e4m3 that magnitudes stand for under a factor, which lie in a table: so a
// factor costs no multiplication, but e4m3 must hold the products. They are stored relative to the row's largest factor of
// the 128 columns, as distances of up to 14 binades, which e4m3 holds to the last bit (384 to 2^-9); what is farther off is
// zero. By the largest itself, a float, the row's sums over the 128 columns are multiplied.
//
// A word of codes has magnitudes in bits 2:0 of nibbles 0 .. 3, of register r < 2, and 4 .. 7, of register r + 2; the signs
// of the former in bit 7 of each byte, of the latter in bit 3. So the nibbles choose, and a sign is in its place or four off.
// A word of factors has the distance of step s in bits 6:3 of byte s, the place of that row of the table in bytes; and the
// exponent of the float in what is left, its lower half in bits 26:23, the upper in bits 18:15.
constexpr int kDistances = 16;  // the last for what is farther off

struct alignas(8) Magnitudes {
  uint32_t low, high;  // e4m3 of the eight magnitudes
};

// Of a distance: 0, 0.5, 1, 1.5, 2, 3, 4, 6 times 2^(6 - distance).
__host__ __device__ constexpr Magnitudes magnitudes(int distance) {
  constexpr int kHalves[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  uint32_t words[2] = {};
  for (int code = 0; code < 8 && distance < kDistances - 1; ++code) {
    int const units = kHalves[code] << (14 - distance);  // of 2^-9, e4m3's least
    int exponent = 0;
    while (units >> exponent >= 16) ++exponent;
    uint32_t const bits = units < 8 ? units : uint32_t(exponent + 1) << 3 | (units >> exponent & 7);
    words[code / 4] |= bits << 8 * (code % 4);
  }
  return {words[0], words[1]};
}

struct Fp8Mxfp4 {
  static constexpr bool kDecodes = true, kFp8 = true;
  static constexpr int kSliceK = 128;
  static constexpr int kCodes = kSliceRows * kSliceK / 2, kSliceBytes = kCodes + kSliceRows * 4;
  static constexpr float kScale = 1.0f;
  uint32_t codes[kSliceSteps][2], factors[2];

  __device__ __forceinline__ void load(uint8_t const* slice, int thread) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint4 const four = reinterpret_cast<uint4 const*>(slice)[pair * 256 + thread];
      codes[2 * pair][0] = four.x, codes[2 * pair][1] = four.y, codes[2 * pair + 1][0] = four.z, codes[2 * pair + 1][1] = four.w;
    }
    uint2 const two = reinterpret_cast<uint2 const*>(slice + kCodes)[thread / 4];
    factors[0] = two.x, factors[1] = two.y;
  }

  // What the thread's products of row g + 8 half are multiplied by.
  __device__ __forceinline__ float factor(int half) const {
    return float_of((factors[half] & 0x07800000u) | (factors[half] << 12 & 0x78000000u));
  }

  __device__ __forceinline__ void fragment(Magnitudes const* table, int step, uint32_t (&a)[4]) const {
    constexpr uint32_t kMagnitude = 0x77777777u, kSign = 0x80808080u, kPlace = 0x78787878u;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t const word = codes[step][half], place = choose_bytes(factors[half] & kPlace, 0, 0x4440u | step);
      Magnitudes const row = *reinterpret_cast<Magnitudes const*>(reinterpret_cast<uint8_t const*>(table) + place);
      uint32_t const chosen = word & kMagnitude;
      a[half] = choose_bytes(row.low, row.high, chosen) | (word & kSign);
      a[2 + half] = choose_bytes(row.low, row.high, chosen >> 16) | (word << 4 & kSign);
    }
  }
};

}  // namespace moe::mixed
