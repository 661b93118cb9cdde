// Matrix products of one warp on the tensor cores: D += A B, with A 16 x k row by row, B k x 8, D 16 x 8 in float.
//
// One instruction takes k = 8 TF32 values or k = 16 values of a 16-bit type; either way k is 8 words of 32 bits, a word
// holding one TF32 value or two neighbouring 16-bit values of k. With g = lane / 4 and t = lane % 4 a lane holds
//     A words  a[0] = (row g, word t)   a[1] = (row g + 8, word t)   a[2] = (row g, word t + 4)   a[3] = (g + 8, t + 4)
//     B words  b[0] = (word t, column g)   b[1] = (word t + 4, column g)
//     D        d[0] = (row g, column 2 t)   d[1] = (g, 2 t + 1)   d[2] = (g + 8, 2 t)   d[3] = (g + 8, 2 t + 1)
// (PTX ISA, "Matrix Fragments for mma.m16n8k8 / m16n8k16"). The unit ignores the 13 low bits of a TF32 operand, so
// operands are rounded by tf32_round when they are staged.
#pragma once
#include "element.cuh"

namespace rawkern {

struct Tf32 {};  // names the operand format; its words are float bit patterns

// The format in which tensor cores multiply values of type T.
template <class T>
struct OperandOf {
  using type = T;
};
template <>
struct OperandOf<float> {
  using type = Tf32;
};

// Rounds to TF32's 10 bits of mantissa, to nearest, ties to even, as the copy engine does (tensor_copy.cuh); before
// sm_90, which has an instruction for it, ties away from zero. NaN and infinities stay what they are.
__device__ inline unsigned tf32_round(float value) {
#if RAWKERN_GPU
  unsigned word;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
#endif
  return word;
#else
  unsigned word = __float_as_uint(value);
  if ((word & 0x7f800000u) == 0x7f800000u) return (word & 0x7fffffu) ? word | 0x400000u : word;
  return (word + 0xfffu + (word >> 13 & 1)) & 0xffffe000u;
#endif
}

// The same for an operand of the tensor cores, which ignore the low bits, in fewer instructions before sm_90: adds half
// of the last bit that counts, which is 2^-11 times the value's power of two (of infinities, which stay, infinity).
// Subnormal numbers are then not rounded, only cut.
__device__ inline unsigned tf32_operand(float value) {
#if RAWKERN_GPU && __CUDA_ARCH__ < 900
  float power = __uint_as_float(__float_as_uint(value) & 0xff800000u);
  return __float_as_uint(fmaf(power, 1.0f / 2048, value));
#else
  return tf32_round(value);
#endif
}

// A float as the sum of two TF32 numbers, 22 to 23 bits of it: `high` is the number rounded, `low` what is left, also
// rounded. The product of two numbers is then high * high + high * low + low * high but for two parts in 2^22. TF32 has
// no smaller numbers than float, but fewer of them below 2^-126: parts of less than 2^-137 are lost.
//
// An infinity, or NaN, is all in `low`: in `high`, it would meet a low part that is zero and become NaN. Numbers that
// would be rounded to infinity are cut.
template <int kCount>
__device__ inline void split_tf32(const float (&values)[kCount], unsigned (&high)[kCount], unsigned (&low)[kCount]) {
  const float infinity = __uint_as_float(0x7f800000u);
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    high[i] = tf32_round(values[i]);
    low[i] = tf32_round(values[i] - __uint_as_float(high[i]));
    finite &= fabsf(__uint_as_float(high[i])) < infinity;
  }
  if (finite) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (fabsf(__uint_as_float(high[i])) < infinity) continue;
    bool is_number = fabsf(values[i]) < infinity;
    high[i] = is_number ? __float_as_uint(values[i]) & 0xffffe000u : 0;
    low[i] = is_number ? __float_as_uint(values[i] - __uint_as_float(high[i])) & 0xffffe000u : tf32_round(values[i]);
  }
}

#if RAWKERN_GPU
template <class Operand>
__device__ inline void mma_16x8(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

template <>
__device__ inline void mma_16x8<Tf32>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void mma_16x8<Half>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void mma_16x8<BFloat16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
namespace emulator {

// The values of one word: one TF32 value (low bits ignored, as the unit does) or two 16-bit values.
template <class Operand>
struct WordValues {
  static constexpr int kCount = 2;
  static float get(unsigned word, int i) {
    unsigned short bits = (unsigned short)(i ? word >> 16 : word);
    return to_accumulator(Operand{bits});
  }
};
template <>
struct WordValues<Tf32> {
  static constexpr int kCount = 1;
  static float get(unsigned word, int) { return __uint_as_float(word & 0xffffe000u); }
};

struct MmaLane {
  unsigned a[4], b[2];
  float d[4];
};

// The last lane to arrive computes the whole product for the warp.
template <class Operand>
inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Place place) {
  using Values = WordValues<Operand>;
  constexpr int kDepth = 8 * Values::kCount;
  Warp& warp = this_warp();
  unsigned char (*slots)[kSlotBytes] = warp.slot[warp.generation & 1];
  MmaLane* lane = reinterpret_cast<MmaLane*>(slots[lane_id()]);
  memcpy(lane->a, a, sizeof a);
  memcpy(lane->b, b, sizeof b);
  memcpy(lane->d, d, sizeof d);
  warp_barrier(place, [slots] {
    float left[16][kDepth], right[kDepth][8], sum[16][8];
    for (int l = 0; l < kWarpSize; ++l) {
      MmaLane* from = reinterpret_cast<MmaLane*>(slots[l]);
      int g = l / 4, t = l % 4;
      for (int i = 0; i < Values::kCount; ++i) {
        for (int r = 0; r < 4; ++r)
          left[g + r % 2 * 8][(t + r / 2 * 4) * Values::kCount + i] = Values::get(from->a[r], i);
        for (int r = 0; r < 2; ++r) right[(t + r * 4) * Values::kCount + i][g] = Values::get(from->b[r], i);
      }
      for (int r = 0; r < 4; ++r) sum[g + r / 2 * 8][2 * t + r % 2] = from->d[r];
    }
    for (int k = 0; k < kDepth; ++k)
      for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
    for (int l = 0; l < kWarpSize; ++l) {
      MmaLane* to = reinterpret_cast<MmaLane*>(slots[l]);
      for (int r = 0; r < 4; ++r) to->d[r] = sum[l / 4 + r / 2 * 8][2 * (l % 4) + r % 2];
    }
  });
  memcpy(d, lane->d, sizeof d);
}

}  // namespace emulator

template <class Operand>
inline void mma_16x8(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulator::mma<Operand>(d, a, b, RAWKERN_PLACE);
}
#endif

}  // namespace rawkern
