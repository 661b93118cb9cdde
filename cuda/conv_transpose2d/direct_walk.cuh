// The transposed convolution and its input gradient where an output channel comes from one input channel (depthwise
// convolutions above all): what direct_tile.cuh computes, without shared memory, compiled for one kernel size, stride
// and dilation.
//
//     out[n, m, i] = sum over taps j of in[n, m's, position(i, j)] * weight[m, tap(j)]
//
// Such a sum is a handful of products, so that everything around it must cost next to nothing. A thread owns kColumns
// neighbouring output columns, a whole number of strides, of one channel, and walks down them: with each step come
// kPixels output rows. It finds its place and loads all weights of its channel once; from then on they are registers.
// So are the inputs that a step's outputs meet: from step to step the lines that the next outputs meet again move up,
// and only new ones are loaded, each element once per thread and through the L1 cache, where neighbouring threads find
// theirs. Which input and weight an output meets is known at compile time, for all phases: nothing is multiplied by
// an inserted zero. Neighbouring columns are stored by one instruction where memory allows. Threads run along the
// columns first, then along the parts of their height, channels, images; in channels-last memory (kChannelsLast)
// channels come first.
//
// Meant for sm_80 and later. Columns begin at the tensor's first, kLead after a multiple of the stride if one counts
// from `padding` before it; rows begin at such a multiple, so that the first and last step may have fewer.
#pragma once
#include "direct_walk_endings.cuh"
#include "index_space.cuh"
#include "opaque.cuh"
#include "tile_axis.cuh"

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

template <int kPixels_, int kColumns_, int kLead_, bool kChannelsLast_, int kMinBlocks_>
struct WalkShape {
  static constexpr int kPixels = kPixels_, kColumns = kColumns_, kLead = kLead_, kMinBlocks = kMinBlocks_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kThreads = 128;
};

template <class T, class Height, class Width, class Shape, class Ending>
struct DirectWalk : Shape {
  using A = Accumulator<T>;
  using Shape::kPixels, Shape::kColumns, Shape::kLead, Shape::kThreads;

  // Inputs to the right that kColumns outputs meet.
  __host__ __device__ static constexpr int columns_in() {
    int last = 0;
    for (int j = 0; j < kColumns; ++j)
      for (int k = 0; k < Width::kKernel; ++k)
        if (Width::line(kLead + j, k) > last) last = Width::line(kLead + j, k);
    return last + 1;
  }
  static constexpr int kLinesIn = Height::extent(kPixels), kColumnsIn = columns_in();
  static constexpr int kNew = Height::extent(2 * kPixels) - kLinesIn;  // lines from step to step
  static constexpr int kKept = kLinesIn > kNew ? kLinesIn - kNew : 0;
  static_assert(kPixels % Height::kUnit == 0 && kColumns % Width::kUnit == 0, "a step must hold whole phases");

  struct Params {
    DirectWalkParams direct;
    typename Ending::Params ending;
  };

  // The inputs of a thread's columns, line by line.
  struct Source {
    const T* line;
    int64 line_step, column_step;
    int h, height;
    bool has[kColumnsIn];

    __device__ Source(const DirectWalkParams& p, int64 image, int group, int first_h, int first_w) {
      line_step = Height::kInStep * p.in_strides[2];
      column_step = p.in_strides[3];
      h = first_h;
      height = p.height.in_size;
      line = static_cast<const T*>(p.input) + image * p.in_strides[0] + group * p.in_strides[1] + h * p.in_strides[2] +
             first_w * column_step;
#pragma unroll
      for (int c = 0; c < kColumnsIn; ++c) has[c] = unsigned(first_w + c * Width::kInStep) < unsigned(p.width.in_size);
    }

    __device__ void skip(int lines) {
      h += lines * Height::kInStep;
      line += lines * line_step;
    }

    template <int kFirst, int kEnd>
    __device__ void load(A (&window)[kLinesIn][kColumnsIn]) {
      if (column_step == 1)  // then a line's elements lie at distances known at compile time
        load_lines<kFirst, kEnd>(window, 1);
      else
        load_lines<kFirst, kEnd>(window, column_step);
    }

    template <int kFirst, int kEnd>
    __device__ void load_lines(A (&window)[kLinesIn][kColumnsIn], int64 step) {
      T value[kEnd - kFirst > 0 ? kEnd - kFirst : 1][kColumnsIn];  // all under way before the first is needed
#pragma unroll
      for (int i = 0; i < kEnd - kFirst; ++i) {
        bool inside = unsigned(h) < unsigned(height);
#pragma unroll
        for (int c = 0; c < kColumnsIn; ++c) {
          value[i][c] = T{0};
          if (inside && has[c]) value[i][c] = line[c * Width::kInStep * step];
        }
        h += Height::kInStep;
        line += opaque(line_step);
      }
#pragma unroll
      for (int i = 0; i < kEnd - kFirst; ++i)
#pragma unroll
        for (int c = 0; c < kColumnsIn; ++c) window[kFirst + i][c] = to_accumulator(value[i][c]);
    }
  };

  __device__ static int take(int64& rest, int count) {
    int64 outer = quotient(rest, count);
    int part = int(rest - outer * count);
    rest = outer;
    return part;
  }

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
    Source source(p, image, group, Height::origin(p.height, line), Width::origin(p.width, column));
    A window[kLinesIn][kColumnsIn];
    if constexpr (kKept > 0) source.template load<0, kKept>(window);

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
      source.template load<kKept, kLinesIn>(window);
      if (kNew > kLinesIn) source.skip(kNew - kLinesIn);
      A sum[kPixels][kColumns];
      multiply(sum, window, weight);
      ending.consume(sum, at, int64(number) * (p.units / kWarp) + unit / kWarp);
#pragma unroll
      for (int l = 0; l < kKept; ++l)
#pragma unroll
        for (int c = 0; c < kColumnsIn; ++c) window[l][c] = window[l + kNew][c];
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

  __device__ static void multiply(A (&sum)[kPixels][kColumns], const A (&window)[kLinesIn][kColumnsIn],
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
