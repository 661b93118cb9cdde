// Element types: what a tensor stores (double, float, Half, BFloat16) and what is computed with (Accumulator<T>).
//
// 16-bit types are two bytes and nothing else; arithmetic happens in float. NVRTC ships no host headers, and the
// three conversions below are all that the kernels need of cuda_fp16.h and cuda_bf16.h.
#pragma once
#include "platform.cuh"

namespace rawkern {

struct Half {
  unsigned short bits;
};

struct BFloat16 {
  unsigned short bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
// The type in which values of element type T are computed and summed.
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

#if RAWKERN_GPU
__device__ inline float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ inline unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ inline unsigned short float_to_bfloat16(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

__device__ inline double to_accumulator(double value) { return value; }
__device__ inline float to_accumulator(float value) { return value; }
__device__ inline float to_accumulator(Half value) { return half_to_float(value.bits); }
__device__ inline float to_accumulator(BFloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }

// Rounds a computed value to element type T (to nearest, ties to even).
template <class T>
struct Rounded {
  template <class A>
  __device__ static T from(A value) {
    return T(value);
  }
};
template <>
struct Rounded<Half> {
  template <class A>
  __device__ static Half from(A value) {
    return Half{float_to_half(float(value))};
  }
};
template <>
struct Rounded<BFloat16> {
  template <class A>
  __device__ static BFloat16 from(A value) {
    return BFloat16{float_to_bfloat16(float(value))};
  }
};
template <class T, class A>
__device__ inline T from_accumulator(A value) {
  return Rounded<T>::from(value);
}

}  // namespace rawkern
