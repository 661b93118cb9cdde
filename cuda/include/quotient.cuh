// Division of numbers that are rarely large.
#pragma once
#include "element.cuh"

namespace rawkern {

// a / b for a >= 0, b > 0. Division of 64-bit numbers is a long routine on a GPU, and most numbers are small.
__device__ inline int64 quotient(int64 a, int64 b) {
  return ((a | b) >> 32) == 0 ? int64(unsigned(a) / unsigned(b)) : a / b;
}

}  // namespace rawkern
