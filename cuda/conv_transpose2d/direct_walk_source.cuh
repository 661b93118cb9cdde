// What a thread of direct_walk.cuh and of direct_walk_weight_gradient.cuh reads line by line: the inputs that kPixels
// rows of kColumns neighbouring columns of one channel meet. From step to step kKept lines stay in registers and kNew
// are loaded, each element once per thread and through the L1 cache, where neighbouring threads find theirs.
#pragma once
#include "element.cuh"
#include "opaque.cuh"
#include "quotient.cuh"
#include "tile_axis.cuh"

namespace rawkern {

template <int kPixels_, int kColumns_, int kLead_, bool kChannelsLast_, int kMinBlocks_>
struct WalkShape {
  static constexpr int kPixels = kPixels_, kColumns = kColumns_, kLead = kLead_, kMinBlocks = kMinBlocks_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kThreads = 128;
};

// The place of a thread among `count`, and in `rest` what is left to be placed.
__device__ inline int take(int64& rest, int count) {
  int64 outer = quotient(rest, count);
  int part = int(rest - outer * count);
  rest = outer;
  return part;
}

template <class T, class Height, class Width, class Shape>
struct WalkSource {
  using A = Accumulator<T>;
  static constexpr int kPixels = Shape::kPixels, kColumns = Shape::kColumns, kLead = Shape::kLead;
  static_assert(kPixels % Height::kUnit == 0 && kColumns % Width::kUnit == 0, "a step must hold whole phases");

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
  using Window = A[kLinesIn][kColumnsIn];

  const T* line;
  int64 line_step, column_step;
  int h, height;
  bool has[kColumnsIn];

  // From row first_h and column first_w of a channel, which may lie outside.
  __device__ WalkSource(const T* channel, const int64 (&strides)[4], const Axis& rows, const Axis& columns, int first_h,
                        int first_w) {
    line_step = Height::kInStep * strides[2];
    column_step = strides[3];
    h = first_h;
    height = rows.in_size;
    line = channel + h * strides[2] + first_w * column_step;
#pragma unroll
    for (int c = 0; c < kColumnsIn; ++c) has[c] = unsigned(first_w + c * Width::kInStep) < unsigned(columns.in_size);
  }

  // The lines that the first step needs beside its new ones.
  __device__ void begin(Window& window) {
    if constexpr (kKept > 0) load<0, kKept>(window);
  }
  // The new lines of a step.
  __device__ void advance(Window& window) {
    load<kKept, kLinesIn>(window);
    if (kNew > kLinesIn) {
      h += (kNew - kLinesIn) * Height::kInStep;
      line += (kNew - kLinesIn) * line_step;
    }
  }
  // Moves up what the next step meets again.
  __device__ static void keep(Window& window) {
#pragma unroll
    for (int l = 0; l < kKept; ++l)
#pragma unroll
      for (int c = 0; c < kColumnsIn; ++c) window[l][c] = window[l + kNew][c];
  }

  template <int kFirst, int kEnd>
  __device__ void load(Window& window) {
    if (column_step == 1)  // then a line's elements lie at distances known at compile time
      load_lines<kFirst, kEnd>(window, 1);
    else
      load_lines<kFirst, kEnd>(window, column_step);
  }

  template <int kFirst, int kEnd>
  __device__ void load_lines(Window& window, int64 step) {
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

}  // namespace rawkern
