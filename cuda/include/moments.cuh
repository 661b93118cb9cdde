// Count, mean and sum of squared deviations of a set of values, and how two sets combine (Chan, Golub, LeVeque 1979).
//
// Kept in double: the mean of values near 1e6 with deviation 1 has no room in a float, and E[x^2] - E[x]^2 would
// cancel. Partial moments lie in memory as Moments[rows][slots], a row being one channel of one image (n * channels +
// c); the slots of a row are combined in order, so that two runs agree bit for bit. An empty slot has count 0.
#pragma once
#include "platform.cuh"

namespace rawkern {

struct Moments {
  double count;
  double mean;
  double m2;
};

__device__ inline Moments combine(const Moments& a, const Moments& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  double count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
  return Moments{count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

}  // namespace rawkern
