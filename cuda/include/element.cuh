// Element types: what a tensor stores (double, float, Half, BFloat16) and what is computed with (Accumulator<T>).
//
// 16-bit types are two bytes and nothing else; arithmetic happens in float. NVRTC ships no host headers, and the
// conversions below are all that the kernels need of cuda_fp16.h and cuda_bf16.h.
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
// Two at once, the first one in the lower half.
__device__ inline unsigned floats_to_halves(float first, float second) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
__device__ inline unsigned floats_to_bfloat16s(float first, float second) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
#else
inline unsigned floats_to_halves(float first, float second) {
  return float_to_half(first) | unsigned(float_to_half(second)) << 16;
}
inline unsigned floats_to_bfloat16s(float first, float second) {
  return float_to_bfloat16(first) | unsigned(float_to_bfloat16(second)) << 16;
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

// Two elements that are neighbours in memory, rounded together (for 16 bits that is one instruction), as words.
template <class T>
struct Two;
template <>
struct Two<float> {
  static constexpr int kWords = 2;
  unsigned words[kWords];
  __device__ static Two from(float first, float second) {
    return Two{{__float_as_uint(first), __float_as_uint(second)}};
  }
  __device__ float first() const { return __uint_as_float(words[0]); }
  __device__ float second() const { return __uint_as_float(words[1]); }
};
template <>
struct Two<Half> {
  static constexpr int kWords = 1;
  unsigned words[kWords];
  __device__ static Two from(float first, float second) { return Two{{floats_to_halves(first, second)}}; }
  __device__ float first() const { return half_to_float(static_cast<unsigned short>(words[0])); }
  __device__ float second() const { return half_to_float(static_cast<unsigned short>(words[0] >> 16)); }
};
template <>
struct Two<BFloat16> {
  static constexpr int kWords = 1;
  unsigned words[kWords];
  __device__ static Two from(float first, float second) { return Two{{floats_to_bfloat16s(first, second)}}; }
  __device__ float first() const { return __uint_as_float(words[0] << 16); }
  __device__ float second() const { return __uint_as_float(words[0] & 0xffff0000u); }
};

// Neighbours in memory that are loaded and stored as one, 16 bytes at most at a time.
template <class T, int kCount>
struct __align__(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Packed {
  T value[kCount];
};

}  // namespace rawkern
