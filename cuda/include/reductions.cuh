// Combining values of several threads. Always in the same order, so that two runs agree bit for bit.
#pragma once
#include "platform.cuh"

namespace rawkern {

// kCount sums, combined side by side.
template <int kCount>
struct Sums {
  double value[kCount];
  __device__ static Sums none() {
    Sums sums;
    for (int i = 0; i < kCount; ++i) sums.value[i] = 0;
    return sums;
  }
};
template <int kCount>
__device__ inline Sums<kCount> combine(const Sums<kCount>& a, const Sums<kCount>& b) {
  Sums<kCount> sums;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums.value[i] = a.value[i] + b.value[i];
  return sums;
}

// The value (a struct of doubles) of the lane whose number differs in these bits.
template <class Value>
__device__ inline Value shuffle_xor(Value value, int bits) {
  static_assert(sizeof(Value) % sizeof(double) == 0, "a struct of doubles");
  double* words = reinterpret_cast<double*>(&value);
#pragma unroll
  for (int i = 0; i < int(sizeof(Value) / sizeof(double)); ++i) words[i] = __shfl_xor_sync(kFullMask, words[i], bits);
  return value;
}

// Combines one value per thread over teams of neighbouring threads: a power of two up to a warp, or the whole block.
// All threads of the block take part; the first thread of each team gets the result.
template <int kThreads, class Value>
struct TeamCombine {
  static constexpr int kWarps = kThreads / kWarp;
  struct Storage {
    Value partial[kWarps];
  };

  __device__ static Value run(Storage& shared, Value value, int team) {
    for (int distance = 1; distance < team && distance < kWarp; distance *= 2) {
      Value other = shuffle_xor(value, distance);
      value = threadIdx.x & distance ? combine(other, value) : combine(value, other);
    }
    if (team <= kWarp) return value;
    if (threadIdx.x % kWarp == 0) shared.partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int warp = 1; warp < kWarps; ++warp) value = combine(value, shared.partial[warp]);
    return value;
  }
};

// Sums over teams of neighbouring threads, a power of two up to a block; every member gets them. All threads of the
// block take part.
template <int kThreads, int kCount>
struct TeamSum {
  struct Storage {
    Sums<kCount> partial[kThreads / kWarp];
  };

  __device__ static Sums<kCount> run(Storage& shared, Sums<kCount> sums, int team) {
    for (int distance = 1; distance < team && distance < kWarp; distance *= 2)
      sums = combine(sums, shuffle_xor(sums, distance));
    if (team <= kWarp) return sums;
    int warp = threadIdx.x / kWarp, warps = team / kWarp, first = warp / warps * warps;
    __syncthreads();  // what was here before has been read
    if (threadIdx.x % kWarp == 0) shared.partial[warp] = sums;
    __syncthreads();
    sums = shared.partial[first];
#pragma unroll 1
    for (int i = 1; i < warps; ++i) sums = combine(sums, shared.partial[first + i]);
    return sums;
  }
};

}  // namespace rawkern
