// An index space of up to eight dimensions, and where its elements lie in several arrays with strides of their own.
//
// The host drops dimensions of size 1 and merges neighbours that are one step in every array
// (rawkern/launchers/index_space.py), so that nearly every space has one or two dimensions here.
#pragma once
#include "quotient.cuh"

namespace rawkern {

constexpr int kMaxDims = 8;

template <int kArrays>
struct IndexSpace {
  int64 sizes[kMaxDims];
  int64 strides[kArrays][kMaxDims];  // in elements
  int64 count;                       // the product of the sizes
  int dims;                          // at least 1
  int unused;

  // Where the element with this number, counted in row-major order, lies in each array.
  __device__ void locate(int64 index, int64 (&offset)[kArrays]) const {
#pragma unroll
    for (int array = 0; array < kArrays; ++array) offset[array] = 0;
#pragma unroll 1
    for (int dim = dims - 1; dim > 0; --dim) {
      int64 outer = quotient(index, sizes[dim]), place = index - outer * sizes[dim];
#pragma unroll
      for (int array = 0; array < kArrays; ++array) offset[array] += place * strides[array][dim];
      index = outer;
    }
#pragma unroll
    for (int array = 0; array < kArrays; ++array) offset[array] += index * strides[array][0];
  }

  // Distance of neighbours along the last dimension.
  __device__ int64 step(int array) const { return strides[array][dims - 1]; }
};

}  // namespace rawkern
