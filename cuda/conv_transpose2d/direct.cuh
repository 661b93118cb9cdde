// The transposed convolution and its input gradient for few channels per group, on ordinary multiply-adds and without
// shared memory: any kernel, stride, dilation, layout and size from one compiled kernel. direct_tile.cuh and, for one
// input channel per group, direct_walk.cuh compute the same faster, compiled for one kernel size and stride.
//
//     out[n, m, i] = sum over channels k and taps j of in[n, k, position(i, j)] * weight[k, m, tap(j)]
//
// A warp takes 32 neighbouring output columns, each lane one, whatever the phase of its column (axis.cuh), so that
// stores are coalesced for every stride. A lane computes kPixels output rows of one phase for kRows output channels of
// one group and reads inputs and weights through the L1 cache, which neighbouring lanes, rows, taps and channels find
// full. No sum grows long, lest rounding grow with it: products are summed over a run of input channels, the runs'
// sums after that. float32 is multiplied as float32 also where TF32 would do: these problems are bound by memory.
//
// Meant for sm_80 and later, and for problems too small or of too odd a shape to be worth a kernel of their own.
#pragma once
#include "axis.cuh"
#include "direct_endings.cuh"

namespace rawkern {

struct DirectParams {
  const void* input;
  const void* weight;
  int64 in_strides[4];  // n, c, h, w, in elements
  int64 out_strides[4];
  int64 weight_strides[5];  // group, input channel (depth), output channel (row), kernel row, kernel column
  int64 warps;
  Axis height, width;
  int batch, groups;
  int depth, rows;                           // input and output channels of a group
  int row_tiles, height_tiles, width_tiles;  // per group; per phase, of the largest; of all phases together
  int run;                                   // input channels whose products are summed in one go
};

// What a warp works on: columns run fastest, then rows and their phases, output channels, groups, images.
template <class Map, int kPixels>
struct DirectUnit {
  int column, row, phase_h, row_tile, group;
  int64 image, slot;

  __device__ DirectUnit(int64 unit, const DirectParams& p, bool all_rows) {
    int phases = Map::phases(p.height);
    int per_plane = p.width_tiles * p.height_tiles * phases;
    slot = unit % per_plane;
    unit /= per_plane;
    int rest = int(slot);
    column = rest % p.width_tiles * kWarp + threadIdx.x % kWarp;
    rest /= p.width_tiles;
    row = rest % p.height_tiles * kPixels;
    phase_h = rest / p.height_tiles;
    row_tile = group = 0;
    if (!all_rows) {
      row_tile = int(unit % p.row_tiles);
      unit /= p.row_tiles;
      group = int(unit % p.groups);
      unit /= p.groups;
    }
    image = unit;
  }
};

template <class Map, class T, int kRows, int kPixels, class Ending>
struct Direct {
  using A = Accumulator<T>;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = sizeof(A) == 8 ? 3 : 4;

  struct Params {
    DirectParams direct;
    typename Ending::Params ending;
  };

  struct Lane {
    AxisPhase height, width;
    int row, position_w;  // first output row within its phase; column of the input under tap 0
  };

  __device__ static void run(const Params& params) {
    const DirectParams& p = params.direct;
    int64 unit = linear_block() * (kThreads / kWarp) + threadIdx.x / kWarp;
    if (unit >= p.warps) return;
    DirectUnit<Map, kPixels> own(unit, p, Ending::kAllRows);
    Lane lane;
    lane.height = Map::phase(p.height, own.phase_h);
    int phases_w = Map::phases(p.width), column = own.column / phases_w;
    lane.width = Map::phase(p.width, own.column % phases_w);
    lane.row = own.row;
    lane.position_w = lane.width.in_first + column * lane.width.in_step;
    bool exists = own.column < p.width.out_size;
    if (!exists) lane.width.taps = 0;

    DirectPlace at;
    at.image = own.image;
    at.place = own.image * p.out_strides[0] + own.column * p.out_strides[3] +
               (lane.height.out_first + int64(own.row) * lane.height.out_step) * p.out_strides[2];
    at.step = lane.height.out_step * p.out_strides[2];
    at.first = 0;
    at.end = exists ? lane.height.count - own.row : 0;
    if (at.end > kPixels) at.end = kPixels;

    Ending ending(params.ending, p.out_strides[1]);
    int tile = own.group * p.row_tiles + own.row_tile, end = Ending::kAllRows ? p.groups * p.row_tiles : tile + 1;
#pragma unroll 1
    for (; tile < end; ++tile) {
      int group = tile / p.row_tiles, row = tile % p.row_tiles * kRows;
      A total[kRows][kPixels];
      at.channel = group * p.rows + row;
      at.rows = p.rows - row < kRows ? p.rows - row : kRows;
      multiply(total, p, lane, own.image, group, row, at.rows);
      ending.consume(total, at, own.slot);
    }
    ending.finish(at);
  }

  __device__ static void multiply(A (&total)[kRows][kPixels], const DirectParams& p, const Lane& lane, int64 image,
                                  int group, int row, int rows) {
    A sum[kRows][kPixels];
    clear(total);
    clear(sum);
    const T* input =
        static_cast<const T*>(p.input) + image * p.in_strides[0] + int64(group) * p.depth * p.in_strides[1];
    const T* weight = static_cast<const T*>(p.weight) + group * p.weight_strides[0] + row * p.weight_strides[2];
    int left = p.run;
#pragma unroll 1
    for (int channel = 0; channel < p.depth; ++channel) {
#pragma unroll 1
      for (int tap_h = 0; tap_h < lane.height.taps; ++tap_h)
#pragma unroll 1
        for (int tap_w = 0; tap_w < lane.width.taps; ++tap_w)
          multiply_tap(sum, p, lane, input, weight, tap_h, tap_w, rows);
      input += p.in_strides[1];
      weight += p.weight_strides[1];
      if (--left > 0 && channel + 1 < p.depth) continue;
      left = p.run;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int m = 0; m < kPixels; ++m) total[r][m] += sum[r][m];
      clear(sum);
    }
  }

  __device__ static void multiply_tap(A (&sum)[kRows][kPixels], const DirectParams& p, const Lane& lane, const T* input,
                                      const T* weight, int tap_h, int tap_w, int rows) {
    int w = lane.position_w + tap_w * lane.width.in_tap_step;
    if (unsigned(w) >= unsigned(p.width.in_size)) return;
    weight += (lane.height.tap_first + tap_h * lane.height.tap_step) * p.weight_strides[3] +
              (lane.width.tap_first + tap_w * lane.width.tap_step) * p.weight_strides[4];
    A factor[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) factor[r] = r < rows ? to_accumulator(weight[r * p.weight_strides[2]]) : A(0);
    int h = lane.height.in_first + lane.row * lane.height.in_step + tap_h * lane.height.in_tap_step;
    input += w * p.in_strides[3];
#pragma unroll
    for (int m = 0; m < kPixels; ++m, h += lane.height.in_step) {
      if (unsigned(h) >= unsigned(p.height.in_size)) continue;
      A value = to_accumulator(input[h * p.in_strides[2]]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r][m] += value * factor[r];
    }
  }

  __device__ static void clear(A (&sum)[kRows][kPixels]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int m = 0; m < kPixels; ++m) sum[r][m] = 0;
  }
};

}  // namespace rawkern
