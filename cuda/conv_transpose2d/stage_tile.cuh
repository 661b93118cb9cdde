// A rectangle of a tensor's pixels, for some channels of some groups, staged in shared memory as the accumulator's
// type.
//
// What lies outside the image becomes zero, also channels and groups beyond the last. Elements of four and eight bytes
// come by asynchronous copies: await them. 16-bit ones are widened on the way, several under way at a time.
//
// A Grid says at compile time what is staged and where it goes:
//     kThreads, kChannelsLast              who stages, and whether neighbouring threads take neighbouring channels
//     kGroups, kDepth, kLines, kColumns    groups, channels of each, rows, columns
//     kLineStep, kColumnStep               distance of neighbouring rows and columns in the image
//     kGroupPitch, kPitch                  elements from group to group and row to row; a channel is kLines rows
//     place(column)                        where a column goes within its row
#pragma once
#include "async_copy.cuh"
#include "element.cuh"

namespace rawkern {

// Where it comes from, at run time.
template <class T>
struct TileSource {
  const T* channel;         // the first channel's plane
  const int64* strides;     // n, c, h, w, in elements
  int h, w;                 // of the first row and column; may lie outside
  int height, width;        // of the image
  int depth, left, groups;  // channels of a group; of these, from the first on; groups, from the first on
};

// What one thread stages of one column, one after the other: every kAcross-th row, through the rows of all channels and
// groups. From row to row nothing is computed but sums.
template <class T, class Grid>
struct TileLines {
  static constexpr int kSpan = Grid::kColumns < Grid::kThreads ? Grid::kColumns : Grid::kThreads;
  static constexpr int kAcross = Grid::kThreads / kSpan, kPlanes = Grid::kGroups * Grid::kDepth;
  const TileSource<T>& from;
  const T* source;
  int place, line, h, plane, planes;
  bool has_column;

  __device__ TileLines(const TileSource<T>& from, int column) : from(from) {
    line = threadIdx.x / kSpan;
    plane = line < kAcross ? 0 : kPlanes;
    planes = Grid::kGroups == 1 ? from.left : from.groups * Grid::kDepth;
    place = Grid::place(column) + line * Grid::kPitch;
    h = from.h + line * Grid::kLineStep;
    int w = from.w + column * Grid::kColumnStep;
    has_column = unsigned(w) < unsigned(from.width);
    source = from.channel + h * from.strides[2] + w * from.strides[3];
    wrap();
  }
  __device__ bool more() const { return plane < kPlanes; }
  __device__ bool exists() const { return has_column && unsigned(h) < unsigned(from.height) && plane < planes; }
  __device__ void next() {
    line += kAcross;
    place += kAcross * Grid::kPitch;
    h += kAcross * Grid::kLineStep;
    source += kAcross * Grid::kLineStep * from.strides[2];
    wrap();
  }
  __device__ void wrap() {
    while (line >= Grid::kLines) {
      line -= Grid::kLines;
      h -= Grid::kLines * Grid::kLineStep;
      source += from.strides[1] - Grid::kLines * Grid::kLineStep * from.strides[2];
      ++plane;
      if (kPlanes == 1) return;
      if (Grid::kGroups == 1 || plane % Grid::kDepth) continue;
      source += (from.depth - Grid::kDepth) * from.strides[1];
      place += Grid::kGroupPitch - Grid::kDepth * Grid::kLines * Grid::kPitch;
    }
  }
};

// The same in channels-last memory: every kThreads-th element, neighbouring threads neighbouring channels.
template <class T, class Grid>
struct TileChannels {
  const TileSource<T>& from;
  const T* source;
  int number, place;
  bool is_inside;

  __device__ TileChannels(const TileSource<T>& from) : from(from), number(threadIdx.x) { locate(); }
  __device__ bool more() const { return number < Grid::kGroups * Grid::kDepth * Grid::kLines * Grid::kColumns; }
  __device__ bool exists() const { return is_inside; }
  __device__ void next() {
    number += Grid::kThreads;
    locate();
  }
  __device__ void locate() {
    int depth = number % Grid::kDepth, rest = number / Grid::kDepth;
    int group = rest % Grid::kGroups;
    rest /= Grid::kGroups;
    int column = rest % Grid::kColumns, line = rest / Grid::kColumns;
    place = group * Grid::kGroupPitch + (depth * Grid::kLines + line) * Grid::kPitch + Grid::place(column);
    int h = from.h + line * Grid::kLineStep, w = from.w + column * Grid::kColumnStep;
    is_inside = unsigned(h) < unsigned(from.height) && unsigned(w) < unsigned(from.width) && depth < from.left &&
                group < from.groups;
    source = from.channel + h * from.strides[2] + w * from.strides[3] +
             (int64(group) * from.depth + depth) * from.strides[1];
  }
};

template <class T, class Elements>
__device__ inline void stage_elements(Accumulator<T>* tile, Elements elements) {
  if constexpr (sizeof(T) >= 4) {
#pragma unroll 1
    for (; elements.more(); elements.next())
      async_copy_or_zero(&tile[elements.place], elements.source, elements.exists());
  } else {
    constexpr int kAhead = 8;
#pragma unroll 1
    while (elements.more()) {
      T value[kAhead];
      int place[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        place[i] = elements.more() ? elements.place : -1;
        value[i] = elements.more() && elements.exists() ? *elements.source : T{0};
        elements.next();
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (place[i] >= 0) tile[place[i]] = to_accumulator(value[i]);
    }
  }
}

// All threads of the block call it together.
template <class Grid, class T>
__device__ inline void stage_tile(Accumulator<T>* tile, const TileSource<T>& from) {
  using Lines = TileLines<T, Grid>;
  if constexpr (Grid::kChannelsLast)
    stage_elements<T>(tile, TileChannels<T, Grid>(from));
  else
#pragma unroll 1
    for (int column = threadIdx.x % Lines::kSpan; column < Grid::kColumns; column += Lines::kSpan)
      stage_elements<T>(tile, Lines(from, column));
}

}  // namespace rawkern
