// The standard normal distribution: its cumulative function Phi and its density, for GELU.
//
// GELU ends convolutions whose speed is then set by the number of instructions issued, and with erff it takes 26. In
// float, Phi(-u) for u = |x| is therefore computed as
//     2^(u P(u)) / 2,   P a polynomial of degree 9,
// and Phi(u) as 1 - Phi(-u): 14 instructions for GELU, one of them by the special function unit. A polynomial in
// 1 / (1 + p u) times exp(-u^2 / 2) would need two of those, which alone take longer.
//
// P minimises the largest error of 2^(u P(u)) / 2 over 0 <= u <= 6.5, divided by max(Phi(-u), 1e-4): absolute first,
// relative in the tail, which 1 + erf loses. It was found by linear programming on 400 Chebyshev points with values of
// 40 digits; the coefficients were rounded to float one after the other, lowest first, the higher ones being fitted
// anew each time. The error is 3.0e-9, a tenth of what rounding may cost 1 + erff(x), and a relative 3.0e-5 where
// Phi(-u) is below 1e-4. The leading coefficient is negative: beyond 6.5, where Phi(-u) is below 5e-11, the exponent
// goes on to fall, faster than it should, down to -infinity. Overall, GELU's error is at most twice that of torch's
// formula with an erf that rounds correctly, and a few ulp (tests/test_gelu.py).
#pragma once
#include "fast_math.cuh"

namespace rawkern {
namespace math {

__device__ inline float normal_cumulative(float x) {
  float u = fabsf(x);
  float p = -2.76750516e-8f;
  p = fmaf(p, u, 8.42371207e-7f);
  p = fmaf(p, u, -1.08989216e-5f);
  p = fmaf(p, u, 7.64396245e-5f);
  p = fmaf(p, u, -2.79991917e-4f);
  p = fmaf(p, u, -1.84507456e-7f);
  p = fmaf(p, u, 6.94952393e-3f);
  p = fmaf(p, u, -0.0524450466f);
  p = fmaf(p, u, -0.459218979f);
  p = fmaf(p, u, -1.15110445f);
  float twice_tail = fast_exp2(p * u);
  // 1 - tail or tail without a select: the comparison itself gives 1 or 0.
  return fabsf(fmaf(-0.5f, twice_tail, x >= 0.0f ? 1.0f : 0.0f));
}
__device__ inline double normal_cumulative(double x) { return 0.5 * (1.0 + erf(x * 0.70710678118654752440)); }

// Phi(x) for results that are rounded to 16 bits: as above with a polynomial of degree 6. It minimises the largest
// relative error of Phi(-u) over 0 <= u <= 7.5, which is 1.9e-5, a 25th of what rounding to half precision may cost;
// beyond, where Phi(-u) is below 4e-14, the exponent falls faster than it should, as above. (torch's own 1 + erf is 0
// from 5.6 on.)
__device__ inline float brief_normal_cumulative(float x) {
  float u = fabsf(x);
  float p = -1.43641205e-6f;
  p = fmaf(p, u, 5.26291915e-5f);
  p = fmaf(p, u, -8.51457530e-4f);
  p = fmaf(p, u, 8.16392340e-3f);
  p = fmaf(p, u, -0.0531981699f);
  p = fmaf(p, u, -0.459253550f);
  p = fmaf(p, u, -1.15096462f);
  float twice_tail = fast_exp2(p * u);
  return fabsf(fmaf(-0.5f, twice_tail, x >= 0.0f ? 1.0f : 0.0f));
}

// The derivative of GELU, Phi(x) + x phi(x), for results that are rounded to 16 bits: 15 instructions instead of 60. At
// -u, for u >= 0, it is
//     exp(-u^2 / 2) (r - u) S(1 / (u + 2.4)),   r = 0.75179152 the place where it is zero,
// because Phi(-u) / phi(u) is smooth and of the order of 1 / u; at u it is 1 less that. S is a polynomial of degree 4,
// and minimises the largest relative error over 0 <= u <= 13.5, where the exponential ends: 7.4e-6, found as for
// Phi above. As the zero is a factor of its own and nothing cancels, that is the error relative to the derivative, in
// the tail too.
__device__ inline float brief_gelu_derivative(float x) {
  float t = fast_reciprocal(fabsf(x) + 2.4f);
  float s = -1.40492773f;
  s = fmaf(s, t, 1.43287492f);
  s = fmaf(s, t, 0.443746716f);
  s = fmaf(s, t, 0.307130426f);
  s = fmaf(s, t, 0.398757160f);
  float e = fast_exp2(x * (-0.72134752044448170368f * x));
  // With r of x's sign, x - r is the factor at negative x and minus it at others. r, which is not zero, tells the sign
  // of -0.0 as well.
  float r = copysignf(0.751791524f, x);
  return fmaf((x - r) * s, e, r > 0.0f ? 1.0f : 0.0f);
}

// exp(-x^2 / 2) / sqrt(2 pi)
__device__ inline float normal_density(float x) { return 0.39894228040143267794f * expf(-0.5f * x * x); }
__device__ inline double normal_density(double x) { return 0.39894228040143267794 * exp(-0.5 * x * x); }

}  // namespace math
}  // namespace rawkern
