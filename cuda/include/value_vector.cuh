// Vectors of elements, for loads and stores of up to 16 bytes.
#pragma once
#include "element.cuh"

namespace rawkern {

// Values that are loaded and stored as one, to compute with. Those of 16 bits stay in the 32-bit words that they are
// loaded in until they are needed: values that the compiler takes apart where it loads them, in a branch, make it wait
// for every load before it issues the next one.
template <class T, int kCount, bool kPairs = sizeof(T) == 2 && kCount % 2 == 0>
struct __align__(sizeof(T) * kCount) ValueVector {
  using A = Accumulator<T>;
  T value[kCount];

  __device__ A get(int i) const { return to_accumulator(value[i]); }
  __device__ void set(const A (&from)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = from_accumulator<T>(from[i]);
  }
};
template <class T, int kCount>
struct __align__(sizeof(T) * kCount) ValueVector<T, kCount, true> {
  Two<T> pair[kCount / 2];

  __device__ float get(int i) const { return i % 2 ? pair[i / 2].second() : pair[i / 2].first(); }
  __device__ void set(const float (&from)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) pair[i / 2] = Two<T>::from(from[i], from[i + 1]);
  }
};

}  // namespace rawkern
