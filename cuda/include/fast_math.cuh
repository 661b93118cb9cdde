// Functions that a GPU's special function unit approximates in one instruction. The compiler's own take several more,
// to be right for subnormal numbers too; here those count as zero, as argument and as result. Such an instruction
// occupies its unit eight times as long as a multiply-add occupies the others: one of them among 14 instructions costs
// nothing, two do.
//
// A CPU computes them exactly, and so do both devices in double, for which there is no such unit.
#pragma once
#include "platform.cuh"

namespace rawkern {
namespace math {

// 2^x; in float within 2 ulp, and 0 below x = -126.
__device__ inline float fast_exp2(float x) {
#if RAWKERN_GPU
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ inline double fast_exp2(double x) { return exp2(x); }

// 1 / x; in float within 1 ulp, and 0 above |x| = 2^126.
__device__ inline float fast_reciprocal(float x) {
#if RAWKERN_GPU
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}
__device__ inline double fast_reciprocal(double x) { return 1.0 / x; }

}  // namespace math
}  // namespace rawkern
