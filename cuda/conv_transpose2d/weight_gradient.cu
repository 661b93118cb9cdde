// Weight gradient of the transposed convolution:
//     gw[ci, co, kh, kw] = sum over n, hi, wi of x[n, ci, hi, wi] gy[n, co, hi stride - padding + kh dilation, ...].
//
// A GEMM for every tap: rows are input channels, columns output channels (both of one group), depth runs over the
// pixels of x. A block takes one tile of rows and columns of one tap and one slice of the pixels. No sum grows long,
// lest rounding grow with it: products are summed over kRun slabs, those sums over the slice, and slices are many.
// Their partial sums, [slice][group][tap][row][column], are added in a fixed order and in double by the second kernel:
// two runs agree bit for bit. A thread owns kPack pixels of a slab and reads several channels of them, lanes along the
// pixels, while the previous slab is being multiplied; where the tap of a pixel falls outside gy it stages zeros. Two
// slabs of shared memory alternate. Meant for sm_80 and later.
#include "axis.cuh"
#include "block_math.cuh"
#include "opaque.cuh"

namespace rawkern {

struct WeightGradientParams {
  const void* input;
  const void* grad_output;
  void* partial;
  int64 in_strides[4];
  int64 out_strides[4];
  int64 pixels;        // batch * in height * in width
  int64 slice_pixels;  // a multiple of the slab's depth
  int64 slices;
  Axis height, width;
  int groups, rows, columns, row_tiles, column_tiles;
};

// A pixel of x that moves on through the slice, and what meets it in gy under one tap.
template <class T>
struct Pixel {
  int h, w;
  const T* x;  // of this thread's first channel; y may point outside gy
  const T* y;

  Pixel() = default;

  __device__ Pixel(int64 index, const WeightGradientParams& p, const T* input, const T* grad_output) {
    w = int(index % p.width.in_size);
    int64 rest = index / p.width.in_size;
    h = int(rest % p.height.in_size);
    int64 image = rest / p.height.in_size;
    x = input + image * p.in_strides[0] + h * p.in_strides[2] + w * p.in_strides[3];
    y = grad_output + image * p.out_strides[0] + int64(h) * p.height.stride * p.out_strides[2] +
        int64(w) * p.width.stride * p.out_strides[3];
  }

  __device__ void advance(int distance, const WeightGradientParams& p) {
    w += distance;
    x += distance * p.in_strides[3];
    y += int64(distance) * p.width.stride * p.out_strides[3];
    while (w >= p.width.in_size) {
      w -= p.width.in_size;
      x += p.in_strides[2] - p.width.in_size * p.in_strides[3];
      y += p.height.stride * p.out_strides[2] - int64(p.width.in_size) * p.width.stride * p.out_strides[3];
      if (++h == p.height.in_size) {
        h = 0;
        x += p.in_strides[0] - p.height.in_size * p.in_strides[2];
        y += p.out_strides[0] - int64(p.height.in_size) * p.height.stride * p.out_strides[2];
      }
    }
  }
};

template <class Math>
struct WeightGradient {
  using T = typename Math::Element;
  using Word = typename Math::Word;
  using Value = typename Math::Value;
  using Params = WeightGradientParams;
  static constexpr int kThreads = Math::kThreads;
  static constexpr int kMinBlocks = Math::kMinBlocks;
  static constexpr int kPixels = Math::kWords * Math::kPack;  // depth of a slab
  static constexpr int kRun = 128 / kPixels;                  // slabs whose products are summed in one go
  // A thread reads channels in runs of 16 bytes of words, which it stores at once: lanes run along the pixels, so
  // that eight of them write to different banks (Math::Tile), where single words would meet in a few.
  static constexpr int kChannels = 16 / int(sizeof(Word));
  static constexpr int kRunStep = kThreads / Math::kWords;
  static constexpr int kRunsA = int(ceil_div(Math::kBlockM / kChannels, kRunStep));
  static constexpr int kRunsB = int(ceil_div(Math::kBlockN / kChannels, kRunStep));
  static_assert(kThreads % Math::kWords == 0, "threads must tile the slab");
  static_assert(Math::kBlockM % kChannels == 0 && Math::kBlockN % kChannels == 0,
                "runs of channels must tile the slab");

  struct Storage {
    typename Math::Tile tiles[2];
  };

  struct Place {
    int row, column, tap_h, tap_w, group;
    int64 slice;

    // Taps and tiles run fastest: the blocks that read the same pixels run together.
    __device__ Place(int64 block, const Params& p) {
      column = int(block % p.column_tiles) * Math::kBlockN;
      block /= p.column_tiles;
      row = int(block % p.row_tiles) * Math::kBlockM;
      block /= p.row_tiles;
      tap_w = int(block % p.width.kernel);
      block /= p.width.kernel;
      tap_h = int(block % p.height.kernel);
      block /= p.height.kernel;
      group = int(block % p.groups);
      slice = block / p.groups;
    }
  };

  struct Staged {
    Words<Word, kChannels> a[kRunsA], b[kRunsB];
  };

  // Reads this thread's words of both operands; pixels beyond the `left` ones of the slice and taps outside gy give
  // zeros.
  __device__ static void load(Staged& staged, const Params& p, const Place& place, const Pixel<T> (&pixel)[Math::kPack],
                              int64 left) {
    int own = threadIdx.x % Math::kWords * Math::kPack;
    const T* x[Math::kPack];
    const T* y[Math::kPack];
    bool exists[Math::kPack];
#pragma unroll
    for (int i = 0; i < Math::kPack; ++i) {
      int h = pixel[i].h * p.height.stride - p.height.padding + place.tap_h * p.height.dilation;
      int w = pixel[i].w * p.width.stride - p.width.padding + place.tap_w * p.width.dilation;
      exists[i] =
          own + i < left && unsigned(h) < unsigned(p.height.out_size) && unsigned(w) < unsigned(p.width.out_size);
      x[i] = pixel[i].x;
      y[i] = pixel[i].y;
    }
    // x where gy has no pixel is multiplied by zero; it must then be zero too, lest an infinity become NaN.
    load_runs(staged.a, x, exists, p.rows - place.row, Math::kBlockM, p.in_strides[1]);
    load_runs(staged.b, y, exists, p.columns - place.column, Math::kBlockN, p.out_strides[1]);
  }

  // `channels`: how many there are from the tile's first on; `block`: how many a full tile has. Nearly always nothing
  // is missing: then no word is asked about.
  template <int kRuns>
  __device__ static void load_runs(Words<Word, kChannels> (&staged)[kRuns], const T* const (&source)[Math::kPack],
                                   const bool (&exists)[Math::kPack], int channels, int block, int64 stride) {
    bool whole = channels >= block && block % (kRunStep * kChannels) == 0;
#pragma unroll
    for (int i = 0; i < Math::kPack; ++i) whole = whole && exists[i];
    if (whole)
      load_words(staged, source, stride, [](int, int) { return true; });
    else
      load_words(staged, source, stride, [&](int i, int channel) { return exists[i] && channel < channels; });
  }

  template <int kRuns, class Exists>
  __device__ static void load_words(Words<Word, kChannels> (&staged)[kRuns], const T* const (&source)[Math::kPack],
                                    int64 stride, Exists exists) {
    const T* from[Math::kPack];
#pragma unroll
    for (int i = 0; i < Math::kPack; ++i) from[i] = source[i];
    int first = first_channel();
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int r = 0; r < kChannels; ++r) {
        Value values[Math::kPack];
#pragma unroll
        for (int i = 0; i < Math::kPack; ++i) {
          bool read = exists(i, first + run * kRunStep * kChannels + r);
          values[i] = read ? to_accumulator(*from[i]) : Value(0);
          from[i] += opaque(r + 1 < kChannels ? stride : ((kRunStep - 1) * kChannels + 1) * stride);
        }
        staged[run].at[r] = Math::make_word(values);
      }
    }
  }

  __device__ static int first_channel() { return threadIdx.x / Math::kWords * kChannels; }

  __device__ static void store(typename Math::Tile& tile, const Staged& staged) {
    int word = threadIdx.x % Math::kWords;
    store_runs(tile.a[word], staged.a);
    store_runs(tile.b[word], staged.b);
  }

  template <int kRuns, int kStride>
  __device__ static void store_runs(Word (&row)[kStride], const Words<Word, kChannels> (&staged)[kRuns]) {
    constexpr int kBlock = kStride - Math::kPad;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      int channel = first_channel() + run * kRunStep * kChannels;
      if (kBlock % (kRunStep * kChannels) == 0 || channel < kBlock)
        *reinterpret_cast<Words<Word, kChannels>*>(&row[channel]) = staged[run];
    }
  }

  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Storage, shared);
    Place place(linear_block(), p);
    if (place.slice >= p.slices) return;
    int64 begin = place.slice * p.slice_pixels, end = minimum_of(begin + p.slice_pixels, p.pixels);
    typename Math::Accumulators sum;
    multiply_slice(sum, shared, p, place, begin, end);
    int64 tap = (int64(place.group) * p.height.kernel + place.tap_h) * p.width.kernel + place.tap_w;
    int64 taps = int64(p.groups) * p.height.kernel * p.width.kernel;
    Value* partial = static_cast<Value*>(p.partial) + (place.slice * taps + tap) * p.rows * p.columns;
#pragma unroll
    for (int i = 0; i < Math::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Math::kColumns; ++j) {
        int row = place.row + Math::row(i), column = place.column + Math::column(j);
        if (row < p.rows && column < p.columns) partial[int64(row) * p.columns + column] = sum.at(i, j);
      }
  }

  __device__ static void multiply_slice(typename Math::Accumulators& total, Storage& shared, const Params& p,
                                        const Place& place, int64 begin, int64 end) {
    int64 own = begin + threadIdx.x % Math::kWords * Math::kPack;
    int64 row = int64(place.group) * p.rows + place.row + first_channel();
    int64 column = int64(place.group) * p.columns + place.column + first_channel();
    const T* input = static_cast<const T*>(p.input) + row * p.in_strides[1];
    const T* grad_output = static_cast<const T*>(p.grad_output) + column * p.out_strides[1] +
                           (int64(place.tap_h) * p.height.dilation - p.height.padding) * p.out_strides[2] +
                           (int64(place.tap_w) * p.width.dilation - p.width.padding) * p.out_strides[3];
    Pixel<T> pixel[Math::kPack];
#pragma unroll
    for (int i = 0; i < Math::kPack; ++i) pixel[i] = Pixel<T>(own + i, p, input, grad_output);
    Staged staged;
    int64 left = end - begin;
    load(staged, p, place, pixel, left);
    store(shared.tiles[0], staged);
    __syncthreads();
    typename Math::Accumulators sum;
    clear<Math>(sum);
    clear<Math>(total);
    int now = 0, slabs = 0;
    for (bool more = true; more; now ^= 1) {
      more = left > kPixels;
      if (more) {
        left -= kPixels;
#pragma unroll
        for (int i = 0; i < Math::kPack; ++i) pixel[i].advance(kPixels, p);
        load(staged, p, place, pixel, left);
      }
      Math::multiply(sum, shared.tiles[now]);
      if (more) store(shared.tiles[now ^ 1], staged);
      if (++slabs == kRun || !more) {
        add<Math>(total, sum);
        clear<Math>(sum);
        slabs = 0;
      }
      __syncthreads();
    }
  }
};

// gw = sum of the slices' partials, each of kParts threads adding up the slices of a part in order, then the parts in
// order; lanes along the output channels. Many slices of few weights need the parts, few slices of many do not.
template <class T, int kParts>
struct SumSlices {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 2;
  static constexpr int kElements = kThreads / kParts;  // of a block

  struct Params {
    const void* partial;
    void* output;
    int64 slices, elements;
    int64 row_stride, column_stride, tap_strides[2];  // of the weights
    int kernel_h, kernel_w, rows, columns;
  };

  struct Storage {
    double parts[kParts][kElements];
  };

  __device__ static double sum_part(const Params& p, int64 index, int part) {
    const Accumulator<T>* partial = static_cast<const Accumulator<T>*>(p.partial) + index;
    int64 count = ceil_div(p.slices, kParts), end = minimum_of((part + 1) * count, p.slices);
    double sum = 0;
#pragma unroll 8
    for (int64 slice = part * count; slice < end; ++slice) sum += double(partial[slice * p.elements]);
    return sum;
  }

  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Storage, shared);
    int element = threadIdx.x % kElements, part = threadIdx.x / kElements;
    int64 index = linear_block() * kElements + element;
    bool exists = index < p.elements;
    double sum = exists ? sum_part(p, index, part) : 0;
    if (kParts > 1) {
      shared.parts[part][element] = sum;
      __syncthreads();
      for (int other = 1; part == 0 && other < kParts; ++other) sum += shared.parts[other][element];
    }
    if (!exists || part != 0) return;
    int column = int(index % p.columns);
    int64 rest = index / p.columns;
    int row = int(rest % p.rows);
    rest /= p.rows;
    int tap_w = int(rest % p.kernel_w);
    rest /= p.kernel_w;
    int tap_h = int(rest % p.kernel_h);
    int64 group = rest / p.kernel_h;
    static_cast<T*>(p.output)[(group * p.rows + row) * p.row_stride + column * p.column_stride +
                              tap_h * p.tap_strides[0] + tap_w * p.tap_strides[1]] =
        from_accumulator<T>(Accumulator<T>(sum));
  }
};

}  // namespace rawkern
