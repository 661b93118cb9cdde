// The transposed convolution and its input gradient for few channels per group, on ordinary multiply-adds: what
// direct.cuh computes, at the speed of memory, compiled for one kernel size, stride, dilation and number of channels.
//
//     out[n, m, i] = sum over channels k and taps j of in[n, k, position(i, j)] * weight[k, m, tap(j)]
//
// A block computes a rectangle of output pixels for some channels of some groups of one image. It stages the inputs
// these need, with their halo, in shared memory, kDepth channels at a time, by asynchronous copies in which what lies
// outside the image becomes zero; 16-bit types are widened on the way. The weights go into a table beside them. A
// thread owns one output column, whatever its phase, kPixels neighbouring output rows and kRows output channels, whose
// sums are its registers: per input channel and tap column it reads the inputs of its column once, and for every tap
// row kRows weights, and multiplies. All phases come from the same inputs, and neighbouring lanes store neighbouring
// columns. In channels-last memory (kChannelsLast) neighbouring lanes are neighbouring channels instead. Blocks are
// small and several share a multiprocessor, so that one loads while another multiplies; with two kStages a block also
// loads the next kDepth channels while it multiplies these. With kInRuns the sums over kDepth channels are formed by
// themselves and then added up, lest rounding grow with the number of channels.
//
// Meant for sm_80 and later. Nothing is multiplied by an inserted zero except where the phases of a row have different
// numbers of taps: there the table holds a zero, and the lane reads a column of the tile that is always zero.
#pragma once
#include "direct_endings.cuh"
#include "tile_axis.cuh"
#include "stage_tile.cuh"

namespace rawkern {

struct DirectTileParams {
  const void* input;
  const void* weight;
  int64 in_strides[4];  // n, c, h, w, in elements
  int64 out_strides[4];
  int64 weight_strides[5];  // group, input channel (depth), output channel (row), kernel row, kernel column
  int64 blocks;
  Axis height, width;
  int groups, depth, rows;                                // input and output channels of a group
  int width_tiles, height_tiles, row_tiles, group_tiles;  // blocks along each
  int unused;
};

// The shape of a block: kWidth columns x kLines rows of threads' pixels x kRowBlocks x kGroups threads.
template <int kDepth_, int kRows_, int kPixels_, int kWidth_, int kLines_, int kRowBlocks_, int kGroups_,
          bool kChannelsLast_, bool kInRuns_, int kStages_, int kMinBlocks_>
struct DirectShape {
  static constexpr int kDepth = kDepth_, kRows = kRows_, kPixels = kPixels_, kWidth = kWidth_, kLines = kLines_;
  static constexpr int kRowBlocks = kRowBlocks_, kGroups = kGroups_, kStages = kStages_, kMinBlocks = kMinBlocks_;
  static constexpr bool kChannelsLast = kChannelsLast_, kInRuns = kInRuns_;
  static constexpr int kThreads = kWidth * kLines * kRowBlocks * kGroups;
};

template <class T, class Height, class Width, class Shape, class Ending>
struct DirectTile : Shape {
  using A = Accumulator<T>;
  using Shape::kDepth, Shape::kGroups, Shape::kPixels, Shape::kRowBlocks, Shape::kRows, Shape::kThreads;
  static constexpr int kLinesOut = Shape::kLines * kPixels;  // output rows of a block
  static constexpr int kLinesIn = Height::extent(kLinesOut), kColumnsIn = Width::staged(Shape::kWidth);
  static constexpr int kPitch = Width::row_length(Shape::kWidth);
  static constexpr int kPlane = kLinesIn * kPitch;
  static constexpr int kThreadLines = Height::extent(kPixels);
  // Weights of one thread's rows that a vector load fetches; groups are an odd distance apart for lanes along them.
  static constexpr int kRun = kRows < 2 ? 1 : kRows < 4 || sizeof(A) == 8 ? 2 : 4;
  static constexpr int kRowsPadded = (kRows + kRun - 1) / kRun * kRun;
  static constexpr int kTableTap = Width::kPhases * kRowsPadded;
  static constexpr int kTable = kDepth * Height::kKernel * Width::kSlots * kTableTap;
  static constexpr int kOdd = Shape::kChannelsLast && kGroups > 1 && kRun == 1;
  static constexpr int kGroupPitch = kDepth * kPlane + (Shape::kChannelsLast && kDepth * kPlane % 2 == 0);
  static constexpr int kTablePitch = kRowBlocks * kTable + (kOdd && kRowBlocks * kTable % 2 == 0);
  static_assert(kPixels % Height::kUnit == 0 && Shape::kWidth % Width::kUnit == 0, "tiles must hold whole phases");

  struct Params {
    DirectTileParams direct;
    typename Ending::Params ending;
  };

  struct Stage {
    alignas(16) A weights[kGroups * kTablePitch];
    A tile[kGroups * kGroupPitch];
  };
  struct Storage {
    Stage stages[Shape::kStages];
  };

  // What this thread owns within the block.
  struct Own {
    int column, line, row_block, group;

    __device__ Own() {
      int rest = threadIdx.x;
      if (Shape::kChannelsLast) {
        row_block = take(rest, kRowBlocks);
        group = take(rest, kGroups);
        column = take(rest, Shape::kWidth);
        line = rest;
      } else {
        column = take(rest, Shape::kWidth);
        line = take(rest, Shape::kLines);
        row_block = take(rest, kRowBlocks);
        group = rest;
      }
    }
    __device__ static int take(int& rest, int count) {
      int part = rest % count;
      rest /= count;
      return part;
    }
  };

  // What the block owns: columns run fastest, then rows, output channels, groups, images.
  struct Block {
    int column, line, row, group, plane_tile;
    int64 image;

    __device__ Block(int64 block, const DirectTileParams& p) {
      int per_plane = p.width_tiles * p.height_tiles;
      plane_tile = int(block % per_plane);
      block /= per_plane;
      column = Width::first_output(p.width) + plane_tile % p.width_tiles * Shape::kWidth;
      line = Height::first_output(p.height) + plane_tile / p.width_tiles * kLinesOut;
      row = int(block % p.row_tiles) * (kRowBlocks * kRows);
      block /= p.row_tiles;
      group = int(block % p.group_tiles) * kGroups;
      image = block / p.group_tiles;
    }
  };

  __device__ static void run(const Params& params) {
    RAWKERN_SHARED(Storage, shared);
    const DirectTileParams& p = params.direct;
    int64 number = linear_block();
    if (number >= p.blocks) return;
    Block block(number, p);
    if (Width::kUneven) {
      for (int stage = 0; stage < Shape::kStages; ++stage) clear_unmet(shared.stages[stage]);
      __syncthreads();
    }
    Own own;
    int places[Width::kSlots];
    int column = own.column + Width::lead(p.width);
    Width::places(places, column, Shape::kWidth);
    int tile = own.group * kGroupPitch + Height::first_line(own.line * kPixels) * kPitch;
    int weights = own.group * kTablePitch + own.row_block * kTable + column % Width::kPhases * kRowsPadded;
    A sum[kRows][kPixels], total[kRows][kPixels];
    clear(sum);
    clear(total);
    load_stage(shared.stages[0], p, block, 0);
    int now = 0;
#pragma unroll 1
    for (int channel = 0; channel < p.depth; channel += kDepth) {
      async_wait_all();
      __syncthreads();
      bool more = channel + kDepth < p.depth;
      if (Shape::kStages > 1 && more) load_stage(shared.stages[now ^ 1], p, block, channel + kDepth);
      multiply(sum, shared.stages[now].tile + tile, shared.stages[now].weights + weights, places);
      if (Shape::kInRuns) {
        add(total, sum);
        clear(sum);
      }
      if (Shape::kStages > 1) {
        now ^= 1;
      } else if (more) {
        __syncthreads();
        load_stage(shared.stages[0], p, block, channel + kDepth);
      }
    }
    write(params, block, own, Shape::kInRuns ? total : sum);
  }

  __device__ static void write(const Params& params, const Block& block, const Own& own, A (&sum)[kRows][kPixels]) {
    const DirectTileParams& p = params.direct;
    int group = block.group + own.group, row = block.row + own.row_block * kRows;
    int line = block.line + own.line * kPixels - Height::shift(p.height);
    int column = block.column + own.column + Width::lead(p.width) - Width::shift(p.width);
    bool exists = group < p.groups && unsigned(column) < unsigned(p.width.out_size);
    DirectPlace at;
    at.image = block.image;
    at.place = block.image * p.out_strides[0] + line * p.out_strides[2] + column * p.out_strides[3];
    at.step = p.out_strides[2];
    at.channel = group * p.rows + row;
    at.rows = group < p.groups ? minimum_of(p.rows - row, kRows) : 0;
    at.first = line < 0 ? -line : 0;
    at.end = exists ? minimum_of(p.height.out_size - line, kPixels) : 0;
    constexpr int kWarps = Shape::kWidth * Shape::kLines / kWarp;  // of one channel
    int64 slot = int64(block.plane_tile) * kWarps + (own.line * Shape::kWidth + own.column) / kWarp;
    Ending ending(params.ending, p.out_strides[1]);
    ending.consume(sum, at, slot);
    ending.finish(at);
  }

  __device__ static void load_stage(Stage& stage, const DirectTileParams& p, const Block& block, int channel) {
    load_tile(stage, p, block, channel);
    load_weights(stage, p, block, channel);
  }

  // The zero column, and the places in the table that no tap has.
  __device__ static void clear_unmet(Stage& stage) {
    for (int i = threadIdx.x; i < kGroups * kTablePitch; i += kThreads) stage.weights[i] = 0;
    for (int i = threadIdx.x; i < kGroups * kDepth * kLinesIn; i += kThreads)
      stage.tile[i / (kDepth * kLinesIn) * kGroupPitch + i % (kDepth * kLinesIn) * kPitch + kPitch - 1] = 0;
  }

  struct Grid {
    static constexpr int kThreads = Shape::kThreads, kGroups = Shape::kGroups, kDepth = Shape::kDepth;
    static constexpr bool kChannelsLast = Shape::kChannelsLast;
    static constexpr int kLines = kLinesIn, kColumns = kColumnsIn;
    static constexpr int kLineStep = Height::kInStep, kColumnStep = Width::kInStep;
    static constexpr int kPitch = DirectTile::kPitch, kGroupPitch = DirectTile::kGroupPitch;
    __device__ static int place(int column) { return Width::place(column, Shape::kWidth); }
  };

  __device__ static void load_tile(Stage& stage, const DirectTileParams& p, const Block& block, int channel) {
    TileSource<T> from;
    from.channel = static_cast<const T*>(p.input) + block.image * p.in_strides[0] +
                   (int64(block.group) * p.depth + channel) * p.in_strides[1];
    from.strides = p.in_strides;
    from.h = Height::origin(p.height, block.line);
    from.w = Width::origin(p.width, block.column);
    from.height = p.height.in_size;
    from.width = p.width.in_size;
    from.depth = p.depth;
    from.left = p.depth - channel;
    from.groups = p.groups - block.group;
    stage_tile<Grid>(stage.tile, from);
  }

  // weights[group][row block][channel][kernel row][slot][phase][row]
  __device__ static void load_weights(Stage& stage, const DirectTileParams& p, const Block& block, int channel) {
    constexpr int kCount = kGroups * kRowBlocks * kDepth * Height::kKernel * Width::kKernel * kRows;
#pragma unroll 1
    for (int i = threadIdx.x; i < kCount; i += kThreads) {
      int rest = i;
      int tap_w = Own::take(rest, Width::kKernel), tap_h = Own::take(rest, Height::kKernel);
      int r = Own::take(rest, kRows), row_block = Own::take(rest, kRowBlocks), depth = Own::take(rest, kDepth);
      int group = block.group + rest, row = block.row + row_block * kRows + r;
      bool exists = group < p.groups && row < p.rows && channel + depth < p.depth;
      int tap = (depth * Height::kKernel + tap_h) * Width::kSlots + Width::slot_of(tap_w);
      A* weight = &stage.weights[rest * kTablePitch + row_block * kTable + tap * kTableTap +
                                 Width::phase_of(tap_w) * kRowsPadded + r];
      const T* source = static_cast<const T*>(p.weight) + group * p.weight_strides[0] +
                        (channel + depth) * p.weight_strides[1] + row * p.weight_strides[2] +
                        tap_h * p.weight_strides[3] + tap_w * p.weight_strides[4];
      if constexpr (sizeof(T) >= 4)
        async_copy_or_zero(weight, source, exists);
      else
        *weight = exists ? to_accumulator(*source) : A(0);
    }
  }

  __device__ static void multiply(A (&sum)[kRows][kPixels], const A* tile, const A* weights,
                                  const int (&places)[Width::kSlots]) {
#pragma unroll 1
    for (int channel = 0; channel < kDepth; ++channel, tile += kPlane) {
#pragma unroll
      for (int slot = 0; slot < Width::kSlots; ++slot) {
        A input[kThreadLines];
#pragma unroll
        for (int line = 0; line < kThreadLines; ++line) input[line] = tile[line * kPitch + places[slot]];
#pragma unroll
        for (int k = 0; k < Height::kKernel; ++k) {
          A weight[kRowsPadded];
          load_run(weight, weights + (k * Width::kSlots + slot) * kTableTap);
#pragma unroll
          for (int m = 0; m < kPixels; ++m) {
            if (Height::line(m, k) < 0) continue;
#pragma unroll
            for (int r = 0; r < kRows; ++r) sum[r][m] += input[Height::line(m, k)] * weight[r];
          }
        }
      }
      weights += Height::kKernel * Width::kSlots * kTableTap;
    }
  }

  __device__ static void load_run(A (&weight)[kRowsPadded], const A* source) {
#pragma unroll
    for (int r = 0; r < kRowsPadded; r += kRun) {
      auto run = *reinterpret_cast<const Words<A, kRun>*>(source + r);
#pragma unroll
      for (int i = 0; i < kRun; ++i) weight[r + i] = run.at[i];
    }
  }

  __device__ static void clear(A (&sum)[kRows][kPixels]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int m = 0; m < kPixels; ++m) sum[r][m] = 0;
  }

  __device__ static void add(A (&total)[kRows][kPixels], const A (&sum)[kRows][kPixels]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int m = 0; m < kPixels; ++m) total[r][m] += sum[r][m];
  }
};

}  // namespace rawkern
