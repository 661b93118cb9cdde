// What the roles of a warpgroup kernel (warpgroup_gather.cuh) agree on: its parameters, where a tile lies, rings of
// buffers.
#pragma once
#include "tensor_copy.cuh"

namespace rawkern {

constexpr int kMaxSteps = 256, kMaxPhases = 64, kMaxStages = 8, kMaxWeightStages = 12, kMaxBoxes = 4;

// How the input is staged (warpgroup_boxes.cuh, warpgroup_staging.cuh). Where its pixels are neighbours, the copy
// engine brings boxes of rows, or where rows begin anywhere, of the tensor as one long row; where channels are, it
// brings what is to be multiplied. Otherwise pixel by pixel.
enum Staging { kStagePixels, kStageRows, kStageFlat, kStageChannels };

// Division of a number below 2^31 by one that the host knows (fixed_divisor in conv_transpose2d_warpgroup.py): with
// 2^shift the next power of two, the factor is 2^(31 + shift) / divisor, rounded to the next whole number above it;
// what it is too large by adds less than 1 / divisor to the quotient, which does not reach the next whole number.
struct FixedDivisor {
  unsigned factor;
  int shift;
  __device__ unsigned divide(unsigned n) const { return unsigned(uint64(2 * n) * factor >> 32) >> shift; }
};

struct WarpgroupParams {
  const void* input;
  const void* weight;    // packed (warpgroup_pack_weight.cu)
  const TensorMap* map;  // of the input, where the copy engine stages it
  int64 in_strides[4];   // n, c, h, w, in elements
  int64 out_strides[4];
  int tiles;  // less than 2^30
  int batch, groups;
  int depth, rows;                           // input and output channels of a group
  int in_size[2], in_step[2], in_origin[2];  // plane a of staged row r holds the input's row step * r + a + origin
  int out_size[2], out_step[2], base_size[2];
  int stack, tile_rows, tile_columns, column_tiles;
  int staged_rows, pitch, stage_pixels;
  int stages, weight_stages;  // of the two rings
  int slabs, last_slices;     // slices: of 32 bytes of channels, that the last slab has
  int units;                  // of a group, each 64 output channels
  int passes;
  int parts, jobs;  // a tile's passes times units are divided among `parts`, each `jobs` of them
  int staging;      // one of Staging
  int boxes;        // in a ring of each stager warp
  int box_bytes;
  FixedDivisor by_parts, by_groups, by_column_tiles, by_stack;
  int span;                          // pixels of a row, in all its planes: pitch * in_step[1]
  short phase[kMaxPhases][2];        // of each pass, its first phase: row and column
  short first_step[kMaxPhases + 1];  // of phase i of pass q, at q * kPhases + i
  int offset[kMaxSteps + 4];  // of each step, the pixels by which its tap is displaced in the tile; and four more
};

// Division of small numbers (below 2^20) by the same divisor: a multiplication. (n + 1/2) / d is at least 1 / 2d away
// from a whole number, and the rounding error is smaller than that.
struct Divisor {
  int divisor;
  float inverse;
  __device__ explicit Divisor(int divisor) : divisor(divisor), inverse(1.0f / float(divisor)) {}
  __device__ int divide(int n, int& remainder) const {
    int quotient = int((float(n) + 0.5f) * inverse);
    remainder = n - quotient * divisor;
    return quotient;
  }
};

// A place in a ring of buffers, and the parity of its current round.
struct Ring {
  int slot = 0;
  unsigned parity = 0;
  __device__ void advance(int size) {
    ++slot;
    if (slot == size) {
      slot = 0;
      parity ^= 1;
    }
  }
  __device__ void skip(int count, int size) {
    for (slot += count; slot >= size; slot -= size) parity ^= 1;
  }
};

// A tile: where it begins in the stack of images, and its group. Parts of a tile are numbered as tiles.
struct TilePlace {
  int group, image, row, column;  // `row` of image `image`, counted in base pixels; `column` likewise
  int row_tile, column_tile;

  // all_groups: whether a tile is of all of them.
  __device__ TilePlace(const WarpgroupParams& p, int tile, bool all_groups) {
    unsigned whole = p.by_parts.divide(tile);
    unsigned row_and_column = all_groups ? whole : p.by_groups.divide(whole);
    group = all_groups ? 0 : whole - row_and_column * p.groups;
    row_tile = p.by_column_tiles.divide(row_and_column);
    column_tile = row_and_column - row_tile * p.column_tiles;
    unsigned first_row = row_tile * p.tile_rows;
    image = p.by_stack.divide(first_row);
    row = first_row - image * p.stack;
    column = column_tile * p.tile_columns;
  }

  // The image and row (which may lie beyond the last) of a row of the tile.
  __device__ void locate(const WarpgroupParams& p, int row_of_tile, int& at_image, int& at_row) const {
    at_image = image;
    at_row = row + row_of_tile;
    if (at_row >= p.stack) {
      int images = at_row / p.stack;
      at_image += images;
      at_row -= images * p.stack;
    }
  }
};

}  // namespace rawkern
