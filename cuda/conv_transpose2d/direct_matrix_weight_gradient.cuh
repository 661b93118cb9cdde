// Weight gradient for few channels per group on tensor cores, compiled for one kernel size, stride, dilation and number
// of channels: what direct_tile_weight_gradient.cuh computes, for 16-bit types and for float32 in TF32.
//
// A product of matrices for every tap: rows are channels of gy, columns channels of x, depth is pixels of x. The small
// instruction (mma.cuh, 16 x 8 x 8 words) fits 16 x 8 channels, so one group fills it. A block takes up to 8 kRowTiles
// kRowBlocks channels of x and 16 kColumnTiles kColumnBlocks of gy of one group, and a slice of the rectangles that x
// is cut into. It stages a rectangle of x, and once what gy has for it, which all taps share, in shared memory; its
// neighbours on the multiprocessor multiply meanwhile.
//
// A word of 16-bit values holds pixel i and pixel i + kWords of the rectangle's row, not neighbours: whatever a tap
// moves gy by, its words are those of the row further on, and no value is ever moved within a word. Rows of gy are
// sorted by the stride (tile_axis.cuh), so that lanes read neighbouring words, and channels lie 4 banks apart: no bank
// is read twice at a time.
//
// A warp owns eight words of the depth (16 or 8 columns of the rectangle, all its rows), kRowTiles x kColumnTiles
// matrices of channels and kTaps columns of the kernel, all kernel rows, whose sums are its registers. It keeps its x
// in registers, reads each row of gy once for each of its columns of the kernel and multiplies it with all the rows of
// x that it meets. In the end the warps of different words are added in order; slices are so short (the launcher's
// business) that a sum has some thousands of products at most, and SumSlices adds them in double (weight_gradient.cu):
// two runs agree bit for bit.
//
// A pixel of x multiplies only gy that exists: where the rectangle crosses an edge rows are looked at one by one, and
// columns are masked in both operands, so that an infinity there does not become NaN elsewhere. Channels that only fill
// a matrix hold anything; their sums are not stored.
//
// Reads x and gy through the caches, 16 or 32 bits a lane; writes partial sums [slice][group][tap][row][column]. Meant
// for sm_80 and later.
#pragma once
#include "direct_rectangles.cuh"
#include "mma.cuh"
#include "opaque.cuh"
#include "read_only.cuh"
#include "tile_axis.cuh"

namespace rawkern {

// What a word of an operand holds, and how it is made.
template <class T>
struct MatrixWord {
  static constexpr int kPack = 2;
  __device__ static unsigned make(const T (&value)[2]) { return value[0].bits | unsigned(value[1].bits) << 16; }
  __device__ static unsigned mask(int i) { return 0xffffu << 16 * i; }
};
template <>
struct MatrixWord<float> {
  static constexpr int kPack = 1;
  __device__ static unsigned make(const float (&value)[1]) { return tf32_operand(value[0]); }
  __device__ static unsigned mask(int) { return ~0u; }
};

// kLines rows of 8 kSteps words of x. kRows channels of x and kColumns of gy are staged; kRowBlocks x kRowTiles
// matrices of eight channels of x, kColumnBlocks x kColumnTiles of sixteen of gy, kTapBlocks x kTaps columns of the
// kernel.
template <int kSteps_, int kLines_, int kRows_, int kRowTiles_, int kRowBlocks_, int kColumns_, int kColumnTiles_,
          int kColumnBlocks_, int kTaps_, int kTapBlocks_, bool kChannelsLast_, int kMinBlocks_>
struct MatrixWeightGradientShape {
  static constexpr int kSteps = kSteps_, kLines = kLines_, kMinBlocks = kMinBlocks_;
  static constexpr int kRows = kRows_, kRowTiles = kRowTiles_, kRowBlocks = kRowBlocks_;
  static constexpr int kColumns = kColumns_, kColumnTiles = kColumnTiles_, kColumnBlocks = kColumnBlocks_;
  static constexpr int kTaps = kTaps_, kTapBlocks = kTapBlocks_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kRoles = kRowBlocks * kColumnBlocks * kTapBlocks, kThreads = kWarp * kSteps * kRoles;
};

// How a block stages a rectangle of words. A Grid says at compile time:
//     kThreads, kChannelsLast      who stages, and whether neighbouring threads take neighbouring channels
//     kChannels, kLines, kWords    channels, rows, words of a row
//     kLineStep, kColumnStep       distance of neighbouring rows and words in the image
//     kApart                       and of the values of a word
//     kPlane, kPitch               words from channel to channel and row to row
//     place(column)                where a word goes within its row
//
// A thread stages the words of one column and channel, row after row, a batch of loads under way at a time. Addresses
// go on by sums of bytes, and nearly always everything exists: then nothing is asked about.
template <class Grid, class T>
struct WordColumn {
  static constexpr int kPack = MatrixWord<T>::kPack;
  static constexpr int kMost = 10, kMostOfSome = kPack == 1 ? 10 : 5;  // rows of a batch

  // As few batches as can be, all alike.
  __host__ __device__ static constexpr int batch(int most) {
    return int(ceil_div(Grid::kLines, ceil_div(Grid::kLines, most)));
  }

  uint64 source[kPack];  // of the first row
  unsigned* to;
  bool exists[kPack], all;

  __device__ WordColumn(unsigned* words, const TileSource<T>& from, int channel, int column) {
    int last = from.h + (Grid::kLines - 1) * Grid::kLineStep;
    all = from.h >= 0 && last < from.height && Grid::kLines % batch(kMost) == 0;
    int64 first = channel * from.strides[1] + from.h * from.strides[2];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      int w = from.w + column * Grid::kColumnStep + i * Grid::kApart;
      exists[i] = unsigned(w) < unsigned(from.width);
      all = all && exists[i];
      source[i] = reinterpret_cast<uint64>(from.channel + first + w * from.strides[3]);
    }
    to = words + channel * Grid::kPlane + Grid::place(column);
  }

  // Goes on to another channel: `step` from this one, `bytes` in the image.
  __device__ void advance(int step, int64 bytes) {
    to += step * Grid::kPlane;
#pragma unroll
    for (int i = 0; i < kPack; ++i) source[i] += bytes;
  }

  __device__ void stage(const TileSource<T>& from) const {
    if (all)
      stage_lines<true>(from);
    else
      stage_lines<false>(from);
  }

  template <bool kAll>
  __device__ void stage_lines(const TileSource<T>& from) const {
    constexpr int kBatch = batch(kAll ? kMost : kMostOfSome);
    int64 step = Grid::kLineStep * from.strides[2] * int64(sizeof(T));
    uint64 at[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) at[i] = source[i];
#pragma unroll 1
    for (int first = 0; first < Grid::kLines; first += kBatch) {
      T value[kBatch][kPack];
#pragma unroll
      for (int line = 0; line < kBatch; ++line) {
        int h = from.h + (first + line) * Grid::kLineStep;
        bool is_line = kAll || (first + line < Grid::kLines && unsigned(h) < unsigned(from.height));
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          bool read = kAll || (is_line && exists[i]);
          value[line][i] = read ? read_only(reinterpret_cast<const T*>(at[i])) : T{0};
          at[i] += opaque(step);
        }
      }
#pragma unroll
      for (int line = 0; line < kBatch; ++line)
        if (kAll || first + line < Grid::kLines) to[(first + line) * Grid::kPitch] = MatrixWord<T>::make(value[line]);
    }
  }
};

// All threads of the block call it together. Channels beyond the last are not staged.
template <class Grid, class T>
__device__ inline void stage_words(unsigned* to, const TileSource<T>& from) {
  constexpr int kColumns = Grid::kWords < Grid::kThreads ? Grid::kWords : Grid::kThreads;
  constexpr int kSpan = Grid::kChannelsLast ? Grid::kChannels : kColumns, kAcross = Grid::kThreads / kSpan;
  static_assert(kAcross > 0, "a block stages all channels of a pixel together");
  int first = threadIdx.x % kSpan, other = threadIdx.x / kSpan;
  int channels = minimum_of(Grid::kChannels, from.left);
  if (other >= kAcross) return;
  if (Grid::kChannelsLast) {
    if (first >= channels) return;
#pragma unroll 1
    for (int column = other; column < Grid::kWords; column += kAcross)
      WordColumn<Grid, T>(to, from, first, column).stage(from);
    return;
  }
#pragma unroll 1
  for (int column = first; column < Grid::kWords; column += kSpan) {
    WordColumn<Grid, T> own(to, from, other, column);
#pragma unroll 1
    for (int channel = other; channel < channels; channel += kAcross) {
      own.stage(from);
      own.advance(kAcross, kAcross * from.strides[1] * int64(sizeof(T)));
    }
  }
}

template <class T, class Height, class Width, class Shape>
struct DirectMatrixWeightGradient : Shape {
  using Params = DirectTileWeightGradientParams;
  using Block = RectanglesOfBlock<Shape::kRows, Shape::kColumns, 1>;
  using Word = MatrixWord<T>;
  using Shape::kColumns, Shape::kColumnTiles, Shape::kRows, Shape::kRowTiles, Shape::kLines, Shape::kSteps;
  using Shape::kTaps, Shape::kThreads;
  static constexpr int kPack = Word::kPack, kWords = 8 * kSteps, kWidth = kWords * kPack;
  static constexpr int kKernelH = Height::kKernel, kLinesY = Height::extent(kLines);
  static constexpr int kPitchX = kWords, kPitchY = Width::row_length(kWords);

  // The words of a channel: 4, modulo 8, for then eight channels lie in different banks.
  __host__ __device__ static constexpr int plane(int words) { return words + (12 - words % 8) % 8; }
  static constexpr int kPlaneX = plane(kLines * kPitchX), kPlaneY = plane(kLinesY * kPitchY);

  template <int kChannels_, int kLines_, int kWords_, int kLineStep_, int kColumnStep_, int kApart_, int kPlane_,
            int kPitch_>
  struct Grid {
    static constexpr int kThreads = Shape::kThreads, kChannels = kChannels_, kLines = kLines_, kWords = kWords_;
    static constexpr int kLineStep = kLineStep_, kColumnStep = kColumnStep_, kApart = kApart_;
    static constexpr int kPlane = kPlane_, kPitch = kPitch_;
    static constexpr bool kChannelsLast = Shape::kChannelsLast;
    // Rows of gy are sorted, rows of x are not.
    __device__ static int place(int column) { return kPitch == kPitchX ? column : Width::place(column, 8 * kSteps); }
  };
  using GridX = Grid<kRows, kLines, kWords, 1, 1, kWords, kPlaneX, kPitchX>;
  using GridY = Grid<kColumns, kLinesY, Width::staged(kWords), Height::kInStep, Width::kInStep,
                     kWords * Width::kPeriod * Width::kInStep, kPlaneY, kPitchY>;

  struct Stage {
    unsigned x[kRows * kPlaneX];
    unsigned y[kColumns * kPlaneY];
  };
  struct Storage {
    union {
      Stage stage;
      float matrix[Shape::kRoles][kSteps][kWarp][4];
    };
  };

  // A warp's part, and a lane's words: word t of eight, of channels g of each matrix.
  struct Own {
    int step, role, row_block, column_block, tap_block, g, t;

    __device__ Own() {
      int lane = threadIdx.x % kWarp, rest = uniform(int(threadIdx.x) / kWarp);
      g = lane / 4;
      t = lane % 4;
      step = rest % kSteps;
      role = rest / kSteps;
      row_block = role % Shape::kRowBlocks;
      column_block = role / Shape::kRowBlocks % Shape::kColumnBlocks;
      tap_block = role / (Shape::kRowBlocks * Shape::kColumnBlocks);
    }
  };

  using Corner = DirectRectangle<kWidth, kLines>;
  struct Rectangle : Corner {
    using Corner::h, Corner::w;

    __device__ Rectangle(int64 tile, const Params& p) : Corner(tile, p) {}

    // Whether all its pixels exist, and all that they meet in gy.
    __device__ bool is_whole(const Params& p) const {
      int first_h = Height::origin(p.height, h), last_h = first_h + (kLinesY - 1) * Height::kInStep;
      int first_w = Width::origin(p.width, w), last_w = first_w + (Width::extent(kWidth) - 1) * Width::kInStep;
      return h + kLines <= p.height.in_size && w + kWidth <= p.width.in_size && first_h >= 0 && first_w >= 0 &&
             last_h < p.height.out_size && last_w < p.width.out_size;
    }
  };

  using TapSums = float[kKernelH][kColumnTiles][kRowTiles][4];
  using InputWords = unsigned[kLines][kRowTiles][2];
  static constexpr int kMatrices = kTaps * kKernelH * kColumnTiles * kRowTiles;

  __device__ static void run(const Params& p) {
    RAWKERN_DYNAMIC_SHARED(Storage, shared);
    int64 number = linear_block();
    if (number >= p.block_count) return;
    Block block(number, p);
    Own own;
    TapSums sum[kTaps];
#pragma unroll
    for (int i = 0; i < 4 * kMatrices; ++i) (&sum[0][0][0][0][0])[i] = 0;
    int64 tile = block.slice * p.slice_tiles, end = minimum_of(tile + p.slice_tiles, p.tiles);
#pragma unroll 1
    for (; tile < end; ++tile) {
      Rectangle at(tile, p);
      load(shared.stage, p, block, at);
      __syncthreads();
      if (at.is_whole(p))
        multiply<true>(sum, shared.stage, p, own, at);
      else
        multiply<false>(sum, shared.stage, p, own, at);
      __syncthreads();
    }
    write(sum, shared, p, block, own);
  }

  __device__ static void load(Stage& stage, const Params& p, const Block& block, const Rectangle& at) {
    stage_words<GridX>(stage.x, input_source<T>(p, block, at));
    stage_words<GridY>(stage.y, grad_output_source<T, Height, Width>(p, block, at));
  }

  // Channels that fill the last matrix read the last one's words.
  __device__ static int channel(int number, int channels, int tile) {
    return channels % tile == 0 ? number : minimum_of(number, channels - 1);
  }

  // A lane's words of x in all rows of the rectangle.
  __device__ static void read_input(InputWords& x, const Stage& stage, const Own& own, int word,
                                    const unsigned (&mask)[2]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      int row = channel((own.row_block * kRowTiles + r) * 8 + own.g, kRows, 8);
      const unsigned* from = stage.x + row * kPlaneX + word;
#pragma unroll
      for (int m = 0; m < kLines; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) x[m][r][i] = from[m * kPitchX + 4 * i] & mask[i];
    }
  }

  template <bool kAll>
  __device__ static void multiply(TapSums (&sum)[kTaps], const Stage& stage, const Params& p, const Own& own,
                                  const Rectangle& at) {
    int word = own.step * 8 + own.t;
    unsigned mask[2] = {~0u, ~0u};
    InputWords x;
    if (kAll) read_input(x, stage, own, word, mask);
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      int tap = own.tap_block * kTaps + t;
      if (tap >= Width::kKernel) break;
      word = opaque(word);  // after the products of the tap before: what this one reads waits in no register meanwhile
      if (!kAll) {
        mask[0] = mask_of(word, tap, p, at), mask[1] = mask_of(word + 4, tap, p, at);
        read_input(x, stage, own, word, mask);
      }
      const unsigned* y = stage.y + Width::place(tap * Width::kStep, kWords) + word;
      multiply_tap<kAll>(sum[t], x, y, mask, p, own, at);
    }
  }

  // The values of a word whose pixel exists, and what it meets under a tap.
  __device__ static unsigned mask_of(int word, int tap, const Params& p, const Rectangle& at) {
    unsigned mask = 0;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      int w = at.w + word + i * kWords, out_w = Width::origin(p.width, w) + tap * Width::kInStep * Width::kStep;
      if (w < p.width.in_size && unsigned(out_w) < unsigned(p.width.out_size)) mask |= Word::mask(i);
    }
    return mask;
  }

  __host__ __device__ static constexpr bool is_met(int line) {
    for (int k = 0; k < kKernelH; ++k)
      for (int m = 0; m < kLines; ++m)
        if (Height::line(m, k) == line) return true;
    return false;
  }

  // One column of the kernel, all its rows; `from` is this lane's first word of channel 0.
  template <bool kAll>
  __device__ static void multiply_tap(TapSums& sum, const InputWords& x, const unsigned* from,
                                      const unsigned (&mask)[2], const Params& p, const Own& own, const Rectangle& at) {
    int first = Height::origin(p.height, at.h), moved = 0;
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
      int column = (own.column_block * kColumnTiles + c) * 16 + own.g;
      const unsigned* upper = from + channel(column, kColumns, 16) * kPlaneY;
      const unsigned* lower = from + channel(column + 8, kColumns, 16) * kPlaneY;
#pragma unroll
      for (int line = 0; line < kLinesY; ++line) {
        if (!is_met(line) || (!kAll && unsigned(first + line * Height::kInStep) >= unsigned(p.height.out_size)))
          continue;
        if (!kAll) moved = opaque(moved);  // after the products of the row before, as above
        const unsigned *a = upper + moved + line * kPitchY, *b = lower + moved + line * kPitchY;
        unsigned y[4] = {a[0], 0, a[4], 0};
        if (kColumns > 8) y[1] = b[0], y[3] = b[4];
        if (!kAll) y[0] &= mask[0], y[1] &= mask[0], y[2] &= mask[1], y[3] &= mask[1];
#pragma unroll
        for (int k = 0; k < kKernelH; ++k)
#pragma unroll
          for (int m = 0; m < kLines; ++m)
            if (Height::line(m, k) == line && (kAll || at.h + m < p.height.in_size)) multiply_rows(sum[k][c], y, x[m]);
      }
    }
  }

  __device__ static void multiply_rows(float (&sum)[kRowTiles][4], const unsigned (&y)[4],
                                       const unsigned (&x)[kRowTiles][2]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) mma_16x8<typename OperandOf<T>::type>(sum[r], y, x[r]);
  }

  // Adds up the warps of each role, matrix by matrix, and stores the sums.
  __device__ static void write(const TapSums (&sum)[kTaps], Storage& shared, const Params& p, const Block& block,
                               const Own& own) {
#pragma unroll
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        shared.matrix[own.role][own.step][threadIdx.x % kWarp][i] = (&sum[0][0][0][0][0])[matrix * 4 + i];
      __syncthreads();
      for (int i = threadIdx.x; i < Shape::kRoles * 128; i += kThreads)
        store(shared, p, block, matrix, i / 128, i % 128);
      __syncthreads();
    }
  }

  // Element `number` of a role's matrix, lanes along the channels of gy.
  __device__ static void store(const Storage& shared, const Params& p, const Block& block, int matrix, int role,
                               int number) {
    int column = number % 16, row = number / 16, lane = column % 8 * 4 + row / 2, i = column / 8 * 2 + row % 2;
    float value = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) value += shared.matrix[role][step][lane][i];
    int row_block = role % Shape::kRowBlocks, rest = role / Shape::kRowBlocks;
    int column_block = rest % Shape::kColumnBlocks, tap_block = rest / Shape::kColumnBlocks;
    row += (row_block * kRowTiles + matrix % kRowTiles) * 8;
    column += (column_block * kColumnTiles + matrix / kRowTiles % kColumnTiles) * 16;
    int tap_h = matrix / (kRowTiles * kColumnTiles) % kKernelH;
    int tap_w = tap_block * kTaps + matrix / (kRowTiles * kColumnTiles * kKernelH);
    if (row >= kRows || column >= kColumns || tap_w >= Width::kKernel) return;
    row += block.row;
    column += block.column;
    if (row >= p.rows || column >= p.columns) return;
    int64 tap = ((block.slice * p.groups + block.group) * kKernelH + tap_h) * Width::kKernel + tap_w;
    static_cast<float*>(p.partial)[(tap * p.rows + row) * p.columns + column] = value;
  }
};

}  // namespace rawkern
