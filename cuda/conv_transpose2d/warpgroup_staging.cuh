// The input's way into shared memory for warpgroup_gather.cuh: one swizzled row of 128 bytes per pixel (a slab of 32
// TF32 or 64 16-bit channels), zeros for pixels outside the image and channels beyond the last.
//
// A stager warp has its scheduler nearly to itself, so nothing hides its latencies: loops load everything before they
// use anything, and positions are carried along instead of divided out.
#pragma once
#include "async_copy.cuh"
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

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T values[kCount];
};

// Channels apart, pixels neighbours (NCHW, and any other strides). A lane has one pixel (or two, in 16 bits, where the
// host has seen that pairs are aligned and lie inside the image whole or not at all) and takes its channels 32 at a
// time, in two groups of 16: it loads a group, rounds it and stores 16 bytes of a pixel's channels at once. No copy
// through shared memory, which the tensor cores keep busy. While one group is rounded and stored the other one is under
// way, and then the same group of the next 32 channels or pixels, which may belong to the next slab or tile.
template <class T, int kPixels, class Slabs>
struct PixelStager {
  static constexpr int kUnit = 16 / sizeof(T), kGroup = 16, kGroupUnits = kGroup / kUnit, kTurnUnits = 2 * kGroupUnits;
  static constexpr int kBatch = kWarp * kPixels;
  using Loaded = Vector<T, kPixels>;

  Slabs slabs;  // of what is loaded next
  PixelWalk walk;
  int unit;            // its first, in the slab
  const char* source;  // its first channel, of this lane's pixels
  int64 channel_step;  // bytes
  bool inside;
  Loaded group[2][kGroup];

  __device__ PixelStager(const WarpgroupParams& p, int warp, int warps)
      : slabs(p), walk(p, warp * kBatch + pixel(), warps * kBatch), channel_step(p.in_strides[1] * int64(sizeof(T))) {
    locate();
    load(group[0], 0);
    load(group[1], 1);
  }

  __device__ static int pixel() { return threadIdx.x % kWarp * kPixels; }

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
    if (walk.index - pixel() >= walk.count()) {
      walk.restart();
      slabs.advance();
    }
    locate();
  }

  // Group `which` of the two, of the 32 channels that are next.
  __device__ void load(Loaded (&values)[kGroup], int which) {
    int left = slabs.channels() - unit * kUnit - which * kGroup;
    if (left >= kGroup)
      load<true>(values, left);
    else
      load<false>(values, left);
  }
  template <bool kWhole>
  __device__ void load(Loaded (&values)[kGroup], int left) {
#pragma unroll
    for (int c = 0; c < kGroup; ++c) {
      values[c] = inside && (kWhole || c < left) ? *reinterpret_cast<const Loaded*>(source) : Loaded{};
      source += opaque(channel_step);  // a sum, not a product
    }
  }

  // Stages this warp's pixels of a slab, of which the first `units` units are multiplied.
  __device__ void stage(unsigned char* to, int units) {
#pragma unroll 1
    for (int batch = walk.first; batch - pixel() < walk.count(); batch += walk.by) {
      int place[kPixels];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) place[i] = batch < walk.count() ? walk.place(batch + i) : -1;
#pragma unroll 1
      for (int first = 0; first < units; first += kTurnUnits) {
        advance();
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          store(group[which], to, place, first + which * kGroupUnits);
          load(group[which], which);
        }
      }
    }
  }

  __device__ static void store(const Loaded (&values)[kGroup], unsigned char* to, const int (&place)[kPixels],
                               int first) {
    store_as(values, to, place, first, T{});
  }

  __device__ static void store_as(const Loaded (&values)[kGroup], unsigned char* to, const int (&place)[1], int first,
                                  float) {
    Unit units[kGroupUnits];
#pragma unroll
    for (int c = 0; c < kGroup; ++c) units[c / 4].words[c % 4] = tf32_operand(values[c].values[0]);
    if (place[0] < 0) return;
#pragma unroll
    for (int u = 0; u < kGroupUnits; ++u) unit_at(to, place[0], first + u) = units[u];
  }

  template <class Element>
  __device__ static void store_as(const Loaded (&values)[kGroup], unsigned char* to, const int (&place)[1], int first,
                                  Element) {
    if (place[0] < 0) return;
#pragma unroll
    for (int u = 0; u < kGroupUnits; ++u) {
      Unit unit;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        unit.words[i] = values[u * kUnit + 2 * i].values[0].bits | values[u * kUnit + 2 * i + 1].values[0].bits << 16;
      unit_at(to, place[0], first + u) = unit;
    }
  }

  // Of eight lanes that store together, four begin with the one pixel and four with the other: they meet all banks.
  template <class Element>
  __device__ static void store_as(const Loaded (&values)[kGroup], unsigned char* to, const int (&place)[2], int first,
                                  Element) {
    bool swap = threadIdx.x / 4 % 2;
    if (place[0] < 0) return;
#pragma unroll
    for (int u = 0; u < kGroupUnits; ++u)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        bool second = odd != swap;
        Unit unit;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          unit.words[i] = __byte_perm(word_of(values[u * kUnit + 2 * i]), word_of(values[u * kUnit + 2 * i + 1]),
                                      second ? 0x7632 : 0x5410);
        unit_at(to, second ? place[1] : place[0], first + u) = unit;
      }
  }
  __device__ static unsigned word_of(const Loaded& pair) { return pair.values[0].bits | pair.values[1].bits << 16; }
};

// Channels neighbours, in units of 16 bytes: they are copied to where they belong, and float is rounded there. A warp
// takes 16 pixels at a time: eight lanes have the units of a pixel, and each lane four pixels in a row.
template <class T>
struct ChannelStager {
  static constexpr int kUnit = 16 / sizeof(T), kBlock = 4, kPixels = kWarp / 8 * kBlock;

  PixelWalk walk;
  int units = 0, units_before = 0;  // of the slab copied last, and of the one before

  __device__ ChannelStager(const WarpgroupParams& p, int warp, int warps)
      : walk(p, warp * kPixels + threadIdx.x % kWarp / 8 * kBlock, warps * kPixels) {}

  __device__ static int unit() { return threadIdx.x % 8; }

  // Where the four pixels from the walk's on go.
  __device__ void places(int (&to)[kBlock]) const {
#pragma unroll
    for (int e = 0; e < kBlock; ++e) to[e] = walk.place(walk.index + e);
  }

  // Begins to copy a slab, which `Slabs` is at.
  template <class Slabs>
  __device__ void copy(unsigned char* stage, const Slabs& slabs) {
    const WarpgroupParams& p = walk.p;
    units_before = units;
    units = slabs.stage_units();
    bool exists = unit() * kUnit < slabs.channels();
    const T* base = static_cast<const T*>(p.input) + slabs.first_channel() + unit() * kUnit;
    if (unit() < units)
#pragma unroll 1
      for (; walk.index < walk.count(); walk.advance()) {
        int64 offset;
        int column, to[kBlock];
        bool inside = walk.locate(slabs.at, offset, column) && exists;
        places(to);
        const T* source = base + offset;
#pragma unroll
        for (int e = 0; e < kBlock; ++e) {
          async_copy_or_zero(&unit_at(stage, to[e], unit()), reinterpret_cast<const Unit*>(source),
                             inside && unsigned(column + e) < unsigned(p.in_size[1]));
          source += p.in_strides[3];
        }
      }
    walk.restart();
  }

  // Rounds a slab that has arrived: the one copied last, or the one before.
  __device__ void round(unsigned char* stage, bool before) {
    if (sizeof(T) != 4) return;
    if (unit() < (before ? units_before : units))
#pragma unroll 1
      for (; walk.index < walk.count(); walk.advance()) {
        int to[kBlock];
        places(to);
        Unit values[kBlock];
#pragma unroll
        for (int e = 0; e < kBlock; ++e) values[e] = unit_at(stage, to[e], unit());
#pragma unroll
        for (int e = 0; e < kBlock; ++e)
#pragma unroll
          for (int i = 0; i < 4; ++i) values[e].words[i] = tf32_operand(__uint_as_float(values[e].words[i]));
#pragma unroll
        for (int e = 0; e < kBlock; ++e) unit_at(stage, to[e], unit()) = values[e];
      }
    walk.restart();
  }
};

}  // namespace rawkern
