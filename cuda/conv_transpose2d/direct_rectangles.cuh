// What a block of a weight gradient compiled for one shape (direct_tile_weight_gradient.cuh,
// direct_matrix_weight_gradient.cuh) has: some channels of x and of gy, and a slice of the rectangles that x is cut
// into.
#pragma once
#include "axis.cuh"
#include "stage_tile.cuh"

namespace rawkern {

struct DirectTileWeightGradientParams {
  const void* input;
  const void* grad_output;
  void* partial;
  int64 in_strides[4];
  int64 out_strides[4];
  int64 block_count, tiles, slice_tiles;  // blocks; rectangles of all images; of one slice
  Axis height, width;
  int groups, rows, columns;  // input and output channels of a group
  int row_tiles, column_tiles, group_tiles;
  int width_tiles, height_tiles;
};

// Its first channels within a group, its first group, and its slice. Channels run fastest, then groups: the blocks that
// read the same pixels run together.
template <int kRows, int kColumns, int kGroups>
struct RectanglesOfBlock {
  int row, column, group;
  int64 slice;

  __device__ RectanglesOfBlock(int64 block, const DirectTileWeightGradientParams& p) {
    column = int(block % p.column_tiles) * kColumns;
    block /= p.column_tiles;
    row = int(block % p.row_tiles) * kRows;
    block /= p.row_tiles;
    group = int(block % p.group_tiles) * kGroups;
    slice = block / p.group_tiles;
  }
};

// A rectangle of x: its first row and column, its image.
template <int kWidth, int kLines>
struct DirectRectangle {
  int h, w;
  int64 image;

  __device__ DirectRectangle(int64 tile, const DirectTileWeightGradientParams& p) {
    w = int(tile % p.width_tiles) * kWidth;
    tile /= p.width_tiles;
    h = int(tile % p.height_tiles) * kLines;
    image = tile / p.height_tiles;
  }
};

// Where a block finds a rectangle of x, and what gy has for it.
template <class T, class Block, class Rectangle>
__device__ inline TileSource<T> input_source(const DirectTileWeightGradientParams& p, const Block& block,
                                             const Rectangle& at) {
  TileSource<T> x;
  x.channel = static_cast<const T*>(p.input) + at.image * p.in_strides[0] +
              (int64(block.group) * p.rows + block.row) * p.in_strides[1];
  x.strides = p.in_strides;
  x.h = at.h;
  x.w = at.w;
  x.height = p.height.in_size;
  x.width = p.width.in_size;
  x.depth = p.rows;
  x.left = p.rows - block.row;
  x.groups = p.groups - block.group;
  return x;
}
template <class T, class Height, class Width, class Block, class Rectangle>
__device__ inline TileSource<T> grad_output_source(const DirectTileWeightGradientParams& p, const Block& block,
                                                   const Rectangle& at) {
  TileSource<T> y;
  y.channel = static_cast<const T*>(p.grad_output) + at.image * p.out_strides[0] +
              (int64(block.group) * p.columns + block.column) * p.out_strides[1];
  y.strides = p.out_strides;
  y.h = Height::origin(p.height, at.h);
  y.w = Width::origin(p.width, at.w);
  y.height = p.height.out_size;
  y.width = p.width.out_size;
  y.depth = p.columns;
  y.left = p.columns - block.column;
  y.groups = p.groups - block.group;
  return y;
}

}  // namespace rawkern
