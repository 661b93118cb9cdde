// Weight gradient of the transposed convolution:
//     gw[ci, co, kh, kw] = sum over n, hi, wi of x[n, ci, hi, wi] gy[n, co, hi stride - padding + kh dilation, ...].
//
// A GEMM for every tap: rows are input channels, columns output channels (both of one group), depth runs over the
// pixels of x. A block takes one tile of rows and columns of one tap and one slice of the pixels. No sum grows long,
// lest rounding grow with it: products are summed over kRun slabs, those sums over the slice, and slices are many.
// Their partial sums, [slice][group][tap][row][column], are added in a fixed order and in double by the second kernel:
// two runs agree bit for bit. A thread owns kPack pixels of a slab and reads several channels of them, lanes along the
// pixels; where the tap of a pixel falls outside gy it stages zeros. Two slabs of shared memory alternate. Meant for
// sm_80 and later.
#include "axis.cuh"
#include "block_math.cuh"

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

// A pixel of x that moves on through the slice.
struct Pixel {
  int64 index, image;
  int h, w;

  Pixel() = default;

  __device__ Pixel(int64 index, const WeightGradientParams& p) : index(index) {
    w = int(index % p.width.in_size);
    int64 rest = index / p.width.in_size;
    h = int(rest % p.height.in_size);
    image = rest / p.height.in_size;
  }

  __device__ void advance(int distance, const WeightGradientParams& p) {
    index += distance;
    w += distance;
    while (w >= p.width.in_size) {
      w -= p.width.in_size;
      if (++h == p.height.in_size) {
        h = 0;
        ++image;
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
  static constexpr int kChannelStep = kThreads / Math::kWords;
  static constexpr int kStagedA = int(ceil_div(Math::kBlockM, kChannelStep));
  static constexpr int kStagedB = int(ceil_div(Math::kBlockN, kChannelStep));
  static_assert(kThreads % Math::kWords == 0, "threads must tile the slab");

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
    Word a[kStagedA], b[kStagedB];
  };

  // Reads this thread's words of both operands; pixels at or beyond `end` and taps outside gy give zeros.
  __device__ static void load(Staged& staged, const Params& p, const Place& place, const Pixel (&pixel)[Math::kPack],
                              int64 end) {
    const T* x[Math::kPack];
    const T* y[Math::kPack];
    bool has_x[Math::kPack], has_y[Math::kPack];
    int first = threadIdx.x / Math::kWords;
#pragma unroll
    for (int i = 0; i < Math::kPack; ++i) {
      int h = pixel[i].h * p.height.stride - p.height.padding + place.tap_h * p.height.dilation;
      int w = pixel[i].w * p.width.stride - p.width.padding + place.tap_w * p.width.dilation;
      has_x[i] = pixel[i].index < end;
      has_y[i] = has_x[i] && unsigned(h) < unsigned(p.height.out_size) && unsigned(w) < unsigned(p.width.out_size);
      x[i] = static_cast<const T*>(p.input) + pixel[i].image * p.in_strides[0] + pixel[i].h * p.in_strides[2] +
             pixel[i].w * p.in_strides[3] + (int64(place.group) * p.rows + place.row + first) * p.in_strides[1];
      y[i] = static_cast<const T*>(p.grad_output) + pixel[i].image * p.out_strides[0] + h * p.out_strides[2] +
             w * p.out_strides[3] + (int64(place.group) * p.columns + place.column + first) * p.out_strides[1];
    }
    // x where gy has no pixel is multiplied by zero; it must then be zero too, lest an infinity become NaN.
#pragma unroll
    for (int word = 0; word < kStagedA; ++word)
      staged.a[word] = load_word(x, has_y, word * kChannelStep, first + place.row, p.rows, p.in_strides[1]);
#pragma unroll
    for (int word = 0; word < kStagedB; ++word)
      staged.b[word] = load_word(y, has_y, word * kChannelStep, first + place.column, p.columns, p.out_strides[1]);
  }

  __device__ static Word load_word(const T* const (&source)[Math::kPack], const bool (&exists)[Math::kPack], int ahead,
                                   int channel, int channels, int64 stride) {
    Value values[Math::kPack];
#pragma unroll
    for (int i = 0; i < Math::kPack; ++i)
      values[i] = exists[i] && channel + ahead < channels ? to_accumulator(source[i][ahead * stride]) : Value(0);
    return Math::make_word(values);
  }

  __device__ static void store(typename Math::Tile& tile, const Staged& staged) {
    int word = threadIdx.x % Math::kWords, first = threadIdx.x / Math::kWords;
#pragma unroll
    for (int i = 0; i < kStagedA; ++i)
      if (first + i * kChannelStep < Math::kBlockM) tile.a[word][first + i * kChannelStep] = staged.a[i];
#pragma unroll
    for (int i = 0; i < kStagedB; ++i)
      if (first + i * kChannelStep < Math::kBlockN) tile.b[word][first + i * kChannelStep] = staged.b[i];
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
    Pixel pixel[Math::kPack];
#pragma unroll
    for (int i = 0; i < Math::kPack; ++i) pixel[i] = Pixel(own + i, p);
    Staged staged;
    load(staged, p, place, pixel, end);
    store(shared.tiles[0], staged);
    __syncthreads();
    int64 steps = ceil_div(end - begin, kPixels);
    typename Math::Accumulators sum;
    clear<Math>(sum);
    clear<Math>(total);
    for (int64 step = 0; step < steps; ++step) {
      bool more = step + 1 < steps;
      if (more) {
#pragma unroll
        for (int i = 0; i < Math::kPack; ++i) pixel[i].advance(kPixels, p);
        load(staged, p, place, pixel, end);
      }
      Math::multiply(sum, shared.tiles[step & 1]);
      if (more) store(shared.tiles[(step + 1) & 1], staged);
      if (step % kRun == kRun - 1 || !more) {
        add<Math>(total, sum);
        clear<Math>(sum);
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
