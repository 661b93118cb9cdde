// The transposed convolution and its input gradient where an output channel comes from one input channel (depthwise
// convolutions above all): what direct_tile.cuh computes, without shared memory, compiled for one kernel size, stride
// and dilation.
//
//     out[n, m, i] = sum over taps j of in[n, m's, position(i, j)] * weight[m, tap(j)]
//
// Such a sum is a handful of products, so that everything around it must cost next to nothing. A thread owns kColumns
// neighbouring output columns, a whole number of strides, of one channel, and walks down them: with each step come
// kPixels output rows. It finds its place and loads all weights of its channel once; from then on they are registers.
// So are the inputs that a step's outputs meet (direct_walk_source.cuh): from step to step the lines that the next
// outputs meet again move up, and only new ones are loaded. Which input and weight an output meets is known at compile
// time, for all phases: nothing is multiplied by an inserted zero. Neighbouring columns are stored by one instruction
// where memory allows. Threads run along the columns first, then along the parts of their height, channels, images; in
// channels-last memory (kChannelsLast) channels come first.
//
// Meant for sm_80 and later. Columns begin at the tensor's first, kLead after a multiple of the stride if one counts
// from `padding` before it; rows begin at such a multiple, so that the first and last step may have fewer.
#pragma once
#include "direct_walk_endings.cuh"
#include "direct_walk_source.cuh"
#include "index_space.cuh"

namespace rawkern {

struct DirectWalkParams {
  const void* input;
  const void* weight;
  int64 in_strides[4];  // n, c, h, w, in elements
  int64 out_strides[4];
  int64 weight_strides[5];  // group, unused, output channel (row), kernel row, kernel column
  int64 threads;
  Axis height, width;
  int groups, rows;   // output channels of a group
  int units, parts;   // threads along the columns and along the rows, of one channel
  int steps, unused;  // of a thread
};

template <class T, class Height, class Width, class Shape, class Ending>
struct DirectWalk : Shape {
  using A = Accumulator<T>;
  using Shape::kPixels, Shape::kColumns, Shape::kLead, Shape::kThreads;

  using Source = WalkSource<T, Height, Width, Shape>;
  using Window = typename Source::Window;

  struct Params {
    DirectWalkParams direct;
    typename Ending::Params ending;
  };

  __device__ static void run(const Params& params) {
    const DirectWalkParams& p = params.direct;
    int64 rest = linear_block() * kThreads + threadIdx.x;
    if (rest >= p.threads) return;
    int channel = Shape::kChannelsLast ? take(rest, p.groups * p.rows) : 0;
    int unit = take(rest, p.units), part = take(rest, p.parts);
    if (!Shape::kChannelsLast) channel = take(rest, p.groups * p.rows);
    int64 image = rest;
    int group = unsigned(channel) / unsigned(p.rows);

    A weight[Height::kKernel][Width::kKernel];
    load_weights(weight, p, group, channel - group * p.rows);
    int line = Height::first_output(p.height) + part * p.steps * kPixels;
    int column = Width::first_output(p.width) + unit * kColumns;
    const T* input = static_cast<const T*>(p.input) + image * p.in_strides[0] + group * p.in_strides[1];
    Source source(input, p.in_strides, p.height, p.width, Height::origin(p.height, line),
                  Width::origin(p.width, column));
    Window window;
    source.begin(window);

    WalkPlace at;
    at.row = line - Height::shift(p.height);
    column = unit * kColumns;
    at.columns = minimum_of(p.width.out_size - column, kColumns);
    at.limit = at.columns > 0 ? p.height.out_size : 0;
    at.step = p.out_strides[2];
    at.column_step = p.out_strides[3];
    at.place = image * p.out_strides[0] + channel * p.out_strides[1] + at.row * at.step + column * at.column_step;
    Ending ending(params.ending, image, channel, at);
    int number = part * p.steps;
#pragma unroll 1
    for (int left = p.steps; left > 0 && at.row < p.height.out_size; --left) {
      source.advance(window);
      A sum[kPixels][kColumns];
      multiply(sum, window, weight);
      ending.consume(sum, at, int64(number) * (p.units / kWarp) + unit / kWarp);
      Source::keep(window);
      ++number;
      at.row += kPixels;
      at.place += kPixels * at.step;
    }
  }

  __device__ static void load_weights(A (&weight)[Height::kKernel][Width::kKernel], const DirectWalkParams& p,
                                      int group, int row) {
    const T* from = static_cast<const T*>(p.weight) + group * p.weight_strides[0] + row * p.weight_strides[2];
#pragma unroll
    for (int k = 0; k < Height::kKernel; ++k) {
      const T* tap = from;
#pragma unroll
      for (int i = 0; i < Width::kKernel; ++i) {
        weight[k][i] = to_accumulator(*tap);
        tap += p.weight_strides[4];
      }
      from += p.weight_strides[3];
    }
  }

  __device__ static void multiply(A (&sum)[kPixels][kColumns], const Window& window,
                                  const A (&weight)[Height::kKernel][Width::kKernel]) {
#pragma unroll
    for (int m = 0; m < kPixels; ++m) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        sum[m][j] = 0;
#pragma unroll
        for (int k = 0; k < Height::kKernel; ++k) {
          if (Height::line(m, k) < 0) continue;
#pragma unroll
          for (int i = 0; i < Width::kKernel; ++i)
            if (Width::line(kLead + j, i) >= 0)
              sum[m][j] += window[Height::line(m, k)][Width::line(kLead + j, i)] * weight[k][i];
        }
      }
    }
  }
};

}  // namespace rawkern
