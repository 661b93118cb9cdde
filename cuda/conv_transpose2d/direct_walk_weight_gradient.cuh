// Weight gradient of depthwise convolutions, each group of which has one channel of x and one of gy: what
// direct_weight_gradient.cu's kernel for all shapes computes, without shared memory, compiled for one kernel size,
// stride and dilation.
//
// A thread walks as in direct_walk.cuh for the input gradient, but where that kernel has the weights in registers and
// sums up pixels of x, this one has the sums of all weights and loads pixels of x: a strip of kColumns neighbouring
// columns of one channel of x, `steps` times kPixels rows of it, and the lines of gy that they meet. Each element of x
// is loaded once, each of gy once per thread, neighbours through the L1 cache. The lanes of a warp have neighbouring
// strips of one channel, along the columns first, then the height, then the images, and are combined in a tree; in
// channels-last memory (kChannelsLast) they have one strip of neighbouring channels. A warp takes `slice_strips` strips
// of a channel; the slices' sums are added in order by SumSlices.
//
// What is outside of either tensor counts as zero, which is wrong where the other factor is infinite or NaN, and costs
// nothing where it is not: then a sum is NaN in the end, and the thread does all its strips again, a pixel at a time,
// and multiplies only what exists.
//
// Meant for sm_80 and later.
#pragma once
#include "direct_walk_source.cuh"
#include "endings.cuh"
#include "index_space.cuh"

namespace rawkern {

struct DirectWalkWeightGradientParams {
  const void* grad_output;
  const void* input;
  void* partial;
  int64 grad_strides[4];  // n, c, h, w, in elements
  int64 input_strides[4];
  int64 warps;
  int64 strips, slice_strips;  // of a channel of x; of these, in a slice
  Axis height, width;          // as the input gradient gathers: "in" is gy, "out" is x
  int groups, slices;
  int units, parts;   // strips along the columns and along the rows of an image
  int steps, unused;  // of a strip
};

template <class T, class Height, class Width, class Shape>
struct DirectWalkWeightGradient : Shape {
  using A = Accumulator<T>;
  using Params = DirectWalkWeightGradientParams;
  using Shape::kPixels, Shape::kColumns, Shape::kThreads, Shape::kChannelsLast;
  using Source = WalkSource<T, Height, Width, Shape>;
  static constexpr int kKernelH = Height::kKernel, kKernelW = Width::kKernel;
  static constexpr int kLanes = kChannelsLast ? 1 : kWarp;  // of a channel
  using Sums = A[kKernelH][kKernelW];

  // What a thread sums: strips `first`, first + kLanes, ... below `end` of a channel.
  struct Own {
    int channel;
    int64 slice, first, end;

    __device__ Own(int64 warp, const Params& p) {
      int lane = threadIdx.x % kWarp;
      int64 rest = warp;
      if (kChannelsLast) {
        channel = take(rest, (p.groups + kWarp - 1) / kWarp) * kWarp + lane;
        slice = rest;
      } else {
        slice = take(rest, p.slices);
        channel = int(rest);
      }
      first = slice * p.slice_strips + lane % kLanes;
      end = exists(p) ? minimum_of((slice + 1) * p.slice_strips, p.strips) : first;
    }
    __device__ bool exists(const Params& p) const { return channel < p.groups; }
  };

  // Where a strip lies: rows `row` to `end_row` and the first `columns` columns of a thread, from `pixel` on.
  struct Strip {
    const T* pixel;
    const T* grad;  // the channel of gy
    int row, end_row, column, columns;

    __device__ Strip(int64 number, const Own& own, const Params& p) {
      int64 rest = number;
      column = take(rest, p.units) * kColumns;
      row = take(rest, p.parts) * p.steps * kPixels;
      end_row = minimum_of(row + p.steps * kPixels, p.height.out_size);
      columns = minimum_of(p.width.out_size - column, kColumns);
      pixel = static_cast<const T*>(p.input) + rest * p.input_strides[0] + own.channel * p.input_strides[1] +
              row * p.input_strides[2] + column * p.input_strides[3];
      grad = static_cast<const T*>(p.grad_output) + rest * p.grad_strides[0] + own.channel * p.grad_strides[1];
    }
  };

  __device__ static void run(const Params& p) {
    int64 warp = linear_block() * (kThreads / kWarp) + threadIdx.x / kWarp;
    if (warp >= p.warps) return;
    Own own(warp, p);
    Sums sum;
    clear(sum);
#pragma unroll 1
    for (int64 number = own.first; number < own.end; number += kLanes) walk(sum, Strip(number, own, p), p);
    if (any_nan(sum)) {
      clear(sum);
#pragma unroll 1
      for (int64 number = own.first; number < own.end; number += kLanes) sum_what_exists(sum, Strip(number, own, p), p);
    }
    write(sum, own, p);
  }

  __device__ static void walk(Sums& sum, Strip strip, const Params& p) {
    Source source(strip.grad, p.grad_strides, p.height, p.width, Height::origin(p.height, strip.row),
                  Width::origin(p.width, strip.column));
    typename Source::Window window;
    source.begin(window);
#pragma unroll 1
    for (; strip.row < strip.end_row; strip.row += kPixels) {
      T x[kPixels][kColumns];
      if (p.input_strides[3] == 1)
        load(x, strip, p.input_strides[2], 1);
      else
        load(x, strip, p.input_strides[2], p.input_strides[3]);
      source.advance(window);
      multiply(sum, x, window);
      Source::keep(window);
    }
  }

  // The pixels of a step; zero where there are none.
  __device__ static void load(T (&x)[kPixels][kColumns], Strip& strip, int64 row_step, int64 column_step) {
#pragma unroll
    for (int m = 0; m < kPixels; ++m) {
      bool inside = strip.row + m < strip.end_row;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        x[m][j] = T{0};
        if (inside && j < strip.columns) x[m][j] = strip.pixel[j * column_step];
      }
      strip.pixel += opaque(row_step);
    }
  }

  __device__ static void multiply(Sums& sum, const T (&x)[kPixels][kColumns], const typename Source::Window& window) {
#pragma unroll
    for (int m = 0; m < kPixels; ++m)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int k = 0; k < kKernelH; ++k)
#pragma unroll
          for (int i = 0; i < kKernelW; ++i)
            sum[k][i] += to_accumulator(x[m][j]) * window[Height::line(m, k)][Width::line(j, i)];
  }

  __device__ static void sum_what_exists(Sums& sum, const Strip& strip, const Params& p) {
#pragma unroll 1
    for (int row = strip.row; row < strip.end_row; ++row) {
      const T* pixels = strip.pixel + (row - strip.row) * p.input_strides[2];
      int h = Height::origin(p.height, row);
#pragma unroll 1
      for (int j = 0; j < strip.columns; ++j) {
        A x = to_accumulator(pixels[j * p.input_strides[3]]);
        int w = Width::origin(p.width, strip.column + j);
        const T* grad = strip.grad + h * p.grad_strides[2] + w * p.grad_strides[3];
#pragma unroll
        for (int k = 0; k < kKernelH; ++k) {
          int line = Height::line(0, k) * Height::kInStep;
#pragma unroll
          for (int i = 0; i < kKernelW; ++i) {
            int place = Width::line(0, i) * Width::kInStep;
            if (unsigned(h + line) < unsigned(p.height.in_size) && unsigned(w + place) < unsigned(p.width.in_size))
              sum[k][i] += x * to_accumulator(grad[line * p.grad_strides[2] + place * p.grad_strides[3]]);
          }
        }
      }
    }
  }

  __device__ static void clear(Sums& sum) {
#pragma unroll
    for (int k = 0; k < kKernelH; ++k)
#pragma unroll
      for (int i = 0; i < kKernelW; ++i) sum[k][i] = 0;
  }

  __device__ static bool any_nan(const Sums& sum) {
    bool found = false;
#pragma unroll
    for (int k = 0; k < kKernelH; ++k)
#pragma unroll
      for (int i = 0; i < kKernelW; ++i) found = found || sum[k][i] != sum[k][i];
    return found;
  }

  // [slice][channel][tap], each by a lane of its own where a warp has one channel.
  __device__ static void write(const Sums& sum, const Own& own, const Params& p) {
    A* to = static_cast<A*>(p.partial) + (own.slice * p.groups + own.channel) * (kKernelH * kKernelW);
    bool writes = own.exists(p);
#pragma unroll
    for (int k = 0; k < kKernelH; ++k)
#pragma unroll
      for (int i = 0; i < kKernelW; ++i) {
        int tap = k * kKernelW + i;
        A value = sum[k][i];
        if constexpr (!kChannelsLast) {
          value = warp_sum(value);
          writes = int(threadIdx.x % kWarp) == tap % kWarp;
        }
        if (writes) to[tap] = value;
      }
  }
};

}  // namespace rawkern
