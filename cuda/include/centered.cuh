// Arithmetic of normalisations: which type sums and differences have, and how a mean is subtracted.
#pragma once
#include "element.cuh"

namespace rawkern {

// The type of sums and of differences that may cancel. 16-bit results have no digits for what float loses there.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<float> {
  using type = double;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// Subtracts a double mean from values of type A, with no more rounding than the difference itself needs.
template <class A>
struct Center {
  A high, low;
  __device__ explicit Center(double mean) : high(A(mean)), low(A(mean - double(A(mean)))) {}
  __device__ A operator()(A x) const { return (x - high) - low; }
};
template <>
struct Center<double> {
  double mean;
  __device__ explicit Center(double mean) : mean(mean) {}
  __device__ double operator()(double x) const { return x - mean; }
};

template <class T>
__device__ inline double value_or(const void* vector, int64 i, double otherwise) {
  return vector ? double(to_accumulator(static_cast<const T*>(vector)[i])) : otherwise;
}

}  // namespace rawkern
