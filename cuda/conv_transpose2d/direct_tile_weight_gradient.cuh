// Weight gradient for few channels per group, compiled for one kernel size, stride, dilation and number of channels:
// what direct_weight_gradient.cu's kernel for all shapes computes, reading both operands once.
//
// A block takes some channels of x and of gy of kGroups groups, and a slice of the rectangles that x is cut into. It
// stages each rectangle of x and what gy has for it in shared memory (stage_tile.cuh), the next one while it multiplies
// this one. A thread owns one column of the rectangle, kPixels rows of it, kRows channels of x, kColumns channels of gy
// and kTaps columns of the kernel, whose weights' sums are its registers: it reads its x once, for every channel of gy
// and kernel column the gy of its rows once, and multiplies. Neighbouring lanes own neighbouring groups, then columns.
// In the end the lanes of a warp are combined in a tree, then the warps in order; slices are short (the launcher's
// business), so that no sum is long. A pixel of x multiplies only gy that exists: rows and columns are looked at one by
// one where the rectangle crosses an edge, so that an infinity there does not become NaN elsewhere.
//
// Meant for sm_80 and later.
#pragma once
#include "direct_rectangles.cuh"
#include "endings.cuh"
#include "tile_axis.cuh"

namespace rawkern {

// kWidth columns x kLines x kPixels rows of a rectangle; kRowBlocks x kRows channels of x, kColumnBlocks x kColumns of
// gy, kTapBlocks x kTaps columns of the kernel.
template <int kPixels_, int kWidth_, int kLines_, int kRows_, int kRowBlocks_, int kColumns_, int kColumnBlocks_,
          int kTaps_, int kTapBlocks_, int kGroups_, bool kChannelsLast_, int kMinBlocks_>
struct WeightGradientShape {
  static constexpr int kPixels = kPixels_, kWidth = kWidth_, kLines = kLines_, kGroups = kGroups_;
  static constexpr int kRows = kRows_, kRowBlocks = kRowBlocks_, kColumns = kColumns_, kColumnBlocks = kColumnBlocks_;
  static constexpr int kTaps = kTaps_, kTapBlocks = kTapBlocks_, kMinBlocks = kMinBlocks_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kRoles = kRowBlocks * kColumnBlocks * kTapBlocks, kPixelThreads = kGroups * kWidth * kLines;
  static constexpr int kThreads = kRoles * kPixelThreads;
};

template <class T, class Height, class Width, class Shape>
struct DirectTileWeightGradient : Shape {
  using A = Accumulator<T>;
  using Params = DirectTileWeightGradientParams;
  using Shape::kColumns, Shape::kGroups, Shape::kPixels, Shape::kRows, Shape::kTaps, Shape::kThreads;
  static constexpr int kLinesX = Shape::kLines * kPixels, kLinesY = Height::extent(kLinesX);
  static constexpr int kDepthX = Shape::kRowBlocks * kRows, kDepthY = Shape::kColumnBlocks * kColumns;
  static constexpr int kPitchX = Shape::kWidth, kPitchY = Width::row_length(Shape::kWidth);
  static constexpr int kPlaneX = kLinesX * kPitchX, kPlaneY = kLinesY * kPitchY;
  static constexpr int kGroupX = kDepthX * kPlaneX + (kGroups > 1 && kDepthX * kPlaneX % 2 == 0);
  static constexpr int kGroupY = kDepthY * kPlaneY + (kGroups > 1 && kDepthY * kPlaneY % 2 == 0);
  static constexpr int kThreadLines = Height::extent(kPixels), kStages = 2;
  static constexpr int kSums = kRows * kColumns * kTaps * Height::kKernel, kStrip = kSums < 8 ? kSums : 8;
  static constexpr int kRoleWarps = Shape::kPixelThreads / kWarp;
  static_assert(Shape::kPixelThreads % kWarp == 0, "the threads of a warp must have the same weights");

  template <int kDepth_, int kLines_, int kColumns_, int kLineStep_, int kColumnStep_, int kPitch_, int kGroupPitch_>
  struct Grid {
    static constexpr int kThreads = Shape::kThreads, kGroups = Shape::kGroups, kDepth = kDepth_, kLines = kLines_;
    static constexpr int kColumns = kColumns_, kLineStep = kLineStep_, kColumnStep = kColumnStep_;
    static constexpr int kPitch = kPitch_, kGroupPitch = kGroupPitch_;
    static constexpr bool kChannelsLast = Shape::kChannelsLast;
    // Rows of gy are sorted, rows of x are not.
    __device__ static int place(int column) {
      return kColumns == Shape::kWidth && kPitch == kPitchX ? column : Width::place(column, Shape::kWidth);
    }
  };
  using GridX = Grid<kDepthX, kLinesX, Shape::kWidth, 1, 1, kPitchX, kGroupX>;
  using GridY = Grid<kDepthY, kLinesY, Width::staged(Shape::kWidth), Height::kInStep, Width::kInStep, kPitchY, kGroupY>;

  struct Stage {
    A x[kGroups * kGroupX];
    A y[kGroups * kGroupY];
  };
  struct Storage {
    union {
      Stage stages[kStages];
      A strip[Shape::kRoles * kRoleWarps][kStrip][kGroups];
    };
  };

  struct Own {
    int group, column, line, row_block, column_block, tap_block, role;

    __device__ Own() {
      int rest = threadIdx.x;
      group = take(rest, kGroups);
      column = take(rest, Shape::kWidth);
      line = take(rest, Shape::kLines);
      role = rest;
      row_block = take(rest, Shape::kRowBlocks);
      column_block = take(rest, Shape::kColumnBlocks);
      tap_block = rest;
    }
    __device__ static int take(int& rest, int count) {
      int part = rest % count;
      rest /= count;
      return part;
    }
  };

  using Block = RectanglesOfBlock<kDepthX, kDepthY, kGroups>;
  using Rectangle = DirectRectangle<Shape::kWidth, kLinesX>;
  using Sums = A[kRows][kColumns][kTaps][Height::kKernel];

  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Storage, shared);
    int64 number = linear_block();
    if (number >= p.block_count) return;
    Block block(number, p);
    Own own;
    Sums sum;
    clear(sum);
    int64 tile = block.slice * p.slice_tiles, end = minimum_of(tile + p.slice_tiles, p.tiles);
    if (tile < end) load(shared.stages[0], p, block, Rectangle(tile, p));
    int now = 0;
#pragma unroll 1
    for (; tile < end; ++tile, now ^= 1) {
      async_wait_all();
      __syncthreads();
      if (tile + 1 < end) load(shared.stages[now ^ 1], p, block, Rectangle(tile + 1, p));
      multiply(sum, shared.stages[now], p, own, Rectangle(tile, p));
    }
    __syncthreads();
    write(sum, shared, p, block, own);
  }

  __device__ static void load(Stage& stage, const Params& p, const Block& block, const Rectangle& at) {
    stage_tile<GridX>(stage.x, input_source<T>(p, block, at));
    stage_tile<GridY>(stage.y, grad_output_source<T, Height, Width>(p, block, at));
  }

  __device__ static void multiply(Sums& sum, const Stage& stage, const Params& p, const Own& own, const Rectangle& at) {
    int h = at.h + own.line * kPixels, w = at.w + own.column;
    if (h >= p.height.in_size || w >= p.width.in_size) return;
    A x[kRows][kPixels];
    const A* from = stage.x + own.group * kGroupX + own.row_block * kRows * kPlaneX + own.line * kPixels * kPitchX;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int m = 0; m < kPixels; ++m) x[r][m] = from[r * kPlaneX + m * kPitchX + own.column];
    int first = Height::origin(p.height, h), last = first + (kThreadLines - 1) * Height::kInStep;
    bool all = first >= 0 && last < p.height.out_size && h + kPixels <= p.height.in_size;
    const A* y = stage.y + own.group * kGroupY + own.column_block * kColumns * kPlaneY +
                 Height::first_line(own.line * kPixels) * kPitchY + own.column;
    int origin = Width::origin(p.width, w);
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      int tap = own.tap_block * kTaps + t, place = Width::place(tap * Width::kStep, Shape::kWidth);
      if (tap >= Width::kKernel || unsigned(origin + tap * Width::kInStep * Width::kStep) >= unsigned(p.width.out_size))
        continue;
      if (all)
        multiply_tap<true>(sum, t, x, y + place, p, h, first);
      else
        multiply_tap<false>(sum, t, x, y + place, p, h, first);
    }
  }

  // One column of the kernel, all its rows. kAll: every row of x and of gy that these are is there.
  template <bool kAll>
  __device__ static void multiply_tap(Sums& sum, int t, const A (&x)[kRows][kPixels], const A* from, const Params& p,
                                      int h, int first) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      A y[kThreadLines];
#pragma unroll
      for (int line = 0; line < kThreadLines; ++line) y[line] = from[c * kPlaneY + line * kPitchY];
#pragma unroll
      for (int k = 0; k < Height::kKernel; ++k)
#pragma unroll
        for (int m = 0; m < kPixels; ++m) {
          if (!kAll && (h + m >= p.height.in_size ||
                        unsigned(first + Height::line(m, k) * Height::kInStep) >= unsigned(p.height.out_size)))
            continue;
#pragma unroll
          for (int r = 0; r < kRows; ++r) sum[r][c][t][k] += x[r][m] * y[Height::line(m, k)];
        }
    }
  }

  __device__ static void clear(Sums& sum) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) (&sum[0][0][0][0])[i] = 0;
  }

  // Combines the threads of each role, kStrip sums at a time, and stores them.
  __device__ static void write(Sums& sum, Storage& shared, const Params& p, const Block& block, const Own& own) {
    int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int first = 0; first < kSums; first += kStrip) {
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
        if (first + i >= kSums) break;
        A value = (&sum[0][0][0][0])[first + i];
#pragma unroll
        for (int bits = kWarp / 2; bits >= kGroups; bits /= 2) value += __shfl_xor_sync(kFullMask, value, bits);
        if (lane < kGroups) shared.strip[warp][i][lane] = value;
      }
      __syncthreads();
      for (int i = threadIdx.x; i < Shape::kRoles * kStrip * kGroups; i += kThreads) store(shared, p, block, first, i);
      __syncthreads();
    }
  }

  __device__ static void store(const Storage& shared, const Params& p, const Block& block, int first, int number) {
    int rest = number;
    int group = Own::take(rest, kGroups), i = Own::take(rest, kStrip), role = rest, index = first + i;
    A value = 0;
#pragma unroll 1
    for (int warp = 0; warp < kRoleWarps; ++warp) value += shared.strip[role * kRoleWarps + warp][i][group];
    int tap_h = Own::take(index, Height::kKernel), tap_w = Own::take(index, kTaps), column = Own::take(index, kColumns);
    int row = block.row + Own::take(rest, Shape::kRowBlocks) * kRows + index;
    column += block.column + Own::take(rest, Shape::kColumnBlocks) * kColumns;
    tap_w += rest * kTaps;
    group += block.group;
    if (index >= kRows || group >= p.groups || row >= p.rows || column >= p.columns || tap_w >= Width::kKernel) return;
    int64 tap = ((block.slice * p.groups + group) * Height::kKernel + tap_h) * Width::kKernel + tap_w;
    static_cast<A*>(p.partial)[(tap * p.rows + row) * p.columns + column] = value;
  }
};

}  // namespace rawkern
