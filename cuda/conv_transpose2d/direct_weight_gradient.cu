// Weight gradient of the transposed convolution for few channels per group:
//     gw[ci, co, kh, kw] = sum over n, hi, wi of x[n, ci, hi, wi] gy[n, co, hi stride - padding + kh dilation, ...].
//
// Four kernels: for all shapes, and for one by multiply-adds (direct_walk_weight_gradient.cuh for depthwise
// convolutions, direct_tile_weight_gradient.cuh) or on tensor cores (direct_matrix_weight_gradient.cuh). The one for
// all shapes: a warp takes one weight and one slice of the rows of x (over all images), lanes along a row, and reads
// both operands through the caches, where the warps of the other taps find them. No sum grows long, lest rounding grow
// with it: each lane sums runs of kRun products and then the runs, lanes are combined in a tree, and the slices'
// partial sums, [slice][group][tap][row][column], are added in order and in double by SumSlices (weight_gradient.cu):
// two runs agree bit for bit. Any kernel, stride, dilation, layout and size from one compiled kernel. Meant for sm_80
// and later.
#include "axis.cuh"
#include "direct_matrix_weight_gradient.cuh"
#include "direct_tile_weight_gradient.cuh"
#include "direct_walk_weight_gradient.cuh"
#include "endings.cuh"

namespace rawkern {

struct DirectWeightGradientParams {
  const void* input;
  const void* grad_output;
  void* partial;
  int64 in_strides[4];
  int64 out_strides[4];
  int64 lines;        // batch * in height: rows of x
  int64 slice_lines;  // of one slice
  int64 warps;
  Axis height, width;
  int groups, rows, columns;  // input and output channels of a group
  int unused;
};

template <class T>
struct DirectWeightGradient {
  using A = Accumulator<T>;
  using Params = DirectWeightGradientParams;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr int kRun = 32;

  // Taps run fastest: the warps that read the same pixels run together.
  struct Weight {
    int tap_h, tap_w, row, column, group;
    int64 slice, partial;

    __device__ Weight(int64 unit, const Params& p) {
      int64 rest = unit;
      tap_w = int(rest % p.width.kernel);
      rest /= p.width.kernel;
      tap_h = int(rest % p.height.kernel);
      rest /= p.height.kernel;
      column = int(rest % p.columns);
      rest /= p.columns;
      row = int(rest % p.rows);
      rest /= p.rows;
      group = int(rest % p.groups);
      slice = rest / p.groups;
      int64 tap = ((slice * p.groups + group) * p.height.kernel + tap_h) * p.width.kernel + tap_w;
      partial = (tap * p.rows + row) * p.columns + column;
    }
  };

  __device__ static void run(const Params& p) {
    int64 unit = linear_block() * (kThreads / kWarp) + threadIdx.x / kWarp;
    if (unit >= p.warps) return;
    Weight own(unit, p);
    int64 begin = own.slice * p.slice_lines, end = minimum_of(begin + p.slice_lines, p.lines);
    int offset_h = own.tap_h * p.height.dilation - p.height.padding;
    int offset_w = own.tap_w * p.width.dilation - p.width.padding;
    const T* x = static_cast<const T*>(p.input) + (int64(own.group) * p.rows + own.row) * p.in_strides[1];
    const T* gy = static_cast<const T*>(p.grad_output) + (int64(own.group) * p.columns + own.column) * p.out_strides[1];
    A total = 0, sum = 0;
    int left = kRun;
#pragma unroll 1
    for (int64 line = begin; line < end; ++line) {
      int64 image = line / p.height.in_size;
      int h = int(line - image * p.height.in_size), out_h = h * p.height.stride + offset_h;
      if (unsigned(out_h) >= unsigned(p.height.out_size)) continue;
      const T* x_row = x + image * p.in_strides[0] + h * p.in_strides[2];
      const T* gy_row = gy + image * p.out_strides[0] + out_h * p.out_strides[2];
#pragma unroll 2
      for (int w = threadIdx.x % kWarp; w < p.width.in_size; w += kWarp) {
        int out_w = w * p.width.stride + offset_w;
        if (unsigned(out_w) < unsigned(p.width.out_size))
          sum += to_accumulator(x_row[w * p.in_strides[3]]) * to_accumulator(gy_row[out_w * p.out_strides[3]]);
        if (--left > 0) continue;
        left = kRun;
        total += sum;
        sum = 0;
      }
    }
    total = warp_sum(total + sum);
    if (threadIdx.x % kWarp == 0) static_cast<A*>(p.partial)[own.partial] = total;
  }
};

}  // namespace rawkern
