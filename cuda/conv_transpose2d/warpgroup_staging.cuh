// The input's way into shared memory for warpgroup_gather.cuh, pixel by pixel: what the copy engine cannot bring
// (warpgroup_boxes.cuh), memory that is not aligned, strides of any kind. The stage is the same: one swizzled row of
// 128 bytes per pixel, zeros for pixels outside the image and channels beyond the last.
//
// A stager warp has its scheduler nearly to itself, so nothing hides its latencies: loops load everything before they
// use anything, and positions are carried along instead of divided out.
#pragma once
#include "opaque.cuh"
#include "warpgroup_tile.cuh"
#include "wgmma.cuh"

namespace rawkern {

// Pixels of a stage in the order in which the input's rows are read: `span` of a row, staged_rows rows, and this for
// each plane of rows (there are in_step[0] of them, and of columns in_step[1]).
struct StagedPixels {
  const WarpgroupParams& p;
  Divisor span, staged_rows, step;

  __device__ explicit StagedPixels(const WarpgroupParams& p)
      : p(p), span(p.pitch * p.in_step[1]), staged_rows(p.staged_rows), step(p.in_step[1]) {}

  __device__ int count() const { return p.in_step[0] * p.staged_rows * span.divisor; }

  // Where pixel `index` goes in the stage.
  __device__ int place(int index) const {
    if (p.in_step[0] * p.in_step[1] == 1) return index;
    int x, row, plane_w, y = span.divide(index, x), plane_h = staged_rows.divide(y, row);
    int column = step.divide(x, plane_w);
    return ((plane_h * p.in_step[1] + plane_w) * p.staged_rows + row) * p.pitch + column;
  }
};

// A lane's way through these pixels, a fixed number at a time.
struct PixelWalk : StagedPixels {
  int first, by, first_x, first_y, by_x, by_y;
  int index, x, y;

  __device__ PixelWalk(const WarpgroupParams& p, int first, int by) : StagedPixels(p), first(first), by(by) {
    first_y = span.divide(first, first_x);
    by_y = span.divide(by, by_x);
    restart();
  }
  __device__ void restart() {
    index = first;
    x = first_x;
    y = first_y;
  }
  __device__ void advance() {
    index += by;
    x += by_x;
    y += by_y;
    if (x >= span.divisor) {
      x -= span.divisor;
      ++y;
    }
  }

  // Channel 0 of the pixel, in elements, and its column in the image; false if its row is outside.
  __device__ bool locate(const TilePlace& tile, int64& source, int& column) const {
    int row = y, plane_h = 0, image, at_row;
    if (p.in_step[0] != 1) plane_h = staged_rows.divide(y, row);
    tile.locate(p, row, image, at_row);
    int h = p.in_step[0] * at_row + plane_h + p.in_origin[0];
    column = p.in_step[1] * tile.column + x + p.in_origin[1];
    source = image * p.in_strides[0] + h * p.in_strides[2] + column * p.in_strides[3];
    return image < p.batch && unsigned(h) < unsigned(p.in_size[0]) && plane_h < p.in_step[0];
  }
};

// A lane takes the channels of its pixel 32 at a time (split floats: 16), in two groups: it loads a group, rounds it
// and stores 16 bytes at once. While one group is stored the other one is under way, and then the same group of the
// next channels or pixels, which may belong to the next slab or tile.
template <class T, bool kSplit, class Slabs>
struct SinglePixels {
  using Row = OperandRow<T, kSplit>;
  static constexpr int kUnit = Row::kUnitValues, kGroup = kSplit ? 8 : 16;
  static constexpr int kGroupUnits = kGroup / kUnit, kTurnUnits = 2 * kGroupUnits;

  Slabs slabs;  // of what is loaded next
  PixelWalk walk;
  int unit;            // its first, in the slab
  const char* source;  // its first channel, of this lane's pixel
  int64 channel_step;  // bytes
  bool inside;
  T group[2][kGroupUnits][kUnit];

  __device__ SinglePixels(const WarpgroupParams& p, int warp, int warps)
      : slabs(p),
        walk(p, warp * kWarp + threadIdx.x % kWarp, warps * kWarp),
        channel_step(p.in_strides[1] * int64(sizeof(T))) {
    locate();
    load(group[0], 0);
    load(group[1], 1);
  }

  // Finds the pixels that the walk is at. When there are no more, the tile lies below the last image, and all are
  // zeros.
  __device__ void locate() {
    const WarpgroupParams& p = walk.p;
    int64 offset;
    int column;
    inside = walk.locate(slabs.at, offset, column) && unsigned(column) < unsigned(p.in_size[1]);
    source = static_cast<const char*>(p.input) + offset * int64(sizeof(T)) + slabs.first_channel() * channel_step;
    unit = 0;
  }

  __device__ void advance() {
    unit += kTurnUnits;
    if (unit < slabs.stage_units()) return;
    walk.advance();
    if (walk.index - int(threadIdx.x % kWarp) >= walk.count()) {
      walk.restart();
      slabs.advance();
    }
    locate();
  }

  // Group `which` of the two, of the channels that are next.
  __device__ void load(T (&values)[kGroupUnits][kUnit], int which) {
    int left = slabs.channels() - unit * kUnit - which * kGroup;
    if (left >= kGroup)
      load<true>(values, left);
    else
      load<false>(values, left);
  }
  template <bool kWhole>
  __device__ void load(T (&values)[kGroupUnits][kUnit], int left) {
#pragma unroll
    for (int c = 0; c < kGroup; ++c) {
      bool exists = inside && (kWhole || c < left);
      values[c / kUnit][c % kUnit] = exists ? *reinterpret_cast<const T*>(source) : T{};
      source += opaque(channel_step);  // a sum, not a product
    }
  }

  // Stages this warp's pixels of a slab, of which the first `units` units are multiplied.
  __device__ void stage(unsigned char* to, int units) {
#pragma unroll 1
    for (int index = walk.first; index - int(threadIdx.x % kWarp) < walk.count(); index += walk.by) {
      int place = index < walk.count() ? walk.place(index) : -1;
#pragma unroll 1
      for (int first = 0; first < units; first += kTurnUnits) {
        advance();
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          if (place >= 0) store(group[which], to, place, first + which * kGroupUnits);
          load(group[which], which);
        }
      }
    }
  }

  __device__ static void store(const T (&values)[kGroupUnits][kUnit], unsigned char* to, int place, int first) {
#pragma unroll
    for (int u = 0; u < kGroupUnits; ++u) Row::store(to, place, first + u, values[u]);
  }
};

}  // namespace rawkern
