// Gradients of a transposed convolution of which only the minimum over the channels was used. At an output pixel only
// the channel index[n, ho, wo] has a gradient, g[n, wo] (the same for all rows, since the rows were summed), so each
// gradient needs 1 / C_out of the dense work and the dense gradient never exists:
//
//   SparseInputGradient   gx[n, ci, hi, wi] = sum over taps of g[n, wo] w[ci, index[n, ho, wo], tap]
//   SparseWeightGradient  gw[ci, co, tap]   = sum over pixels with index[n, ho, wo] == co of g[n, wo] x[n, ci, hi, wi]
//   SparseBiasGradient    gb[co]            = sum over pixels with index[n, ho, wo] == co of g[n, wo]
//
// with ho = hi stride - padding + kh dilation, and wo likewise. Input channel ci and output channel co meet if they are
// of the same group. Every sum has one owner and a fixed order: no atomics but on integers, two runs agree bit for bit.
//
// 16 x 64 x 128 x 128 floats, 128 output channels, 3 x 3 taps: 2.4e6 pairs (pixel, tap), 1.5e8 products. An H200 moves
// 128 bytes of shared memory or L1 per multiprocessor and cycle. For 32 products the weight gradient needs 4.4 such
// cycles (x, the sum twice, half an access for what is met; 0.7 to turn x round, which is read once per three taps,
// from L2): at least 0.09 ms in all, measured 0.16 ms back to back. The input gradient needs 1.3 (600 MB of weight rows
// from L1, 67 MB written): at least 0.03 ms, measured 0.08 ms. The bias gradient reads the 4 MB of index once: 0.04 ms.
// For sm_80 and later; the weight gradient takes 54 KB of shared memory.
#include "index_space.cuh"

namespace rawkern {

constexpr int kSparseChannels = 32;  // input channels of a block: a warp's lanes

// Sizes as pairs (height, width).
struct SparseGeometry {
  int64 pixels;  // of the input: batch * height * width
  int in_size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];
  int in_channels, in_per_group, out_per_group;
  int padded_channels;  // in_channels up to a multiple of kSparseChannels

  __device__ int taps() const { return kernel[0] * kernel[1]; }
  __device__ bool one_group() const { return in_per_group == in_channels; }
  __device__ int group_of(int out_channel) const { return one_group() ? 0 : out_channel / out_per_group; }
};

// An input pixel by its number.
struct InputPixel {
  int64 number, image;
  int h, w;
  bool exists;

  __device__ InputPixel(const SparseGeometry& p, int64 number)
      : number(number), image(0), h(0), w(0), exists(number < p.pixels) {
    if (!exists) return;
    int64 row = quotient(number, p.in_size[1]);
    image = quotient(row, p.in_size[0]);
    w = int(number - row * p.in_size[1]);
    h = int(row - image * p.in_size[0]);
  }
  __device__ int64 offset(const int64 (&strides)[4]) const {
    return image * strides[0] + h * strides[2] + w * strides[3];
  }
};

// Goes from a pixel to one a fixed distance on, without dividing.
struct PixelStep {
  int distance, images, rows, columns;

  __device__ PixelStep(const SparseGeometry& p, int distance) : distance(distance) {
    rows = distance / p.in_size[1];
    columns = distance - rows * p.in_size[1];
    images = rows / p.in_size[0];
    rows -= images * p.in_size[0];
  }
  __device__ void advance(InputPixel& pixel, const SparseGeometry& p) const {
    pixel.w += columns;
    bool next_row = pixel.w >= p.in_size[1];
    pixel.w -= next_row ? p.in_size[1] : 0;
    pixel.h += rows + next_row;
    bool next_image = pixel.h >= p.in_size[0];
    pixel.h -= next_image ? p.in_size[0] : 0;
    pixel.image += images + next_image;
    pixel.number += distance;
    pixel.exists = pixel.number < p.pixels;
  }
};

// A tap by its number: what to add to a pixel's place times the stride, to get the output pixel's.
struct Tap {
  bool exists;
  int64 h, w;

  __device__ Tap(const SparseGeometry& p, int number) : exists(number < p.taps()) {
    int row = int(unsigned(number) / unsigned(p.kernel[1]));
    h = int64(row) * p.dilation[0] - p.padding[0];
    w = int64(number - row * p.kernel[1]) * p.dilation[1] - p.padding[1];
  }
};

// What a pixel meets at one tap: the gradient and the output channel, -1 if no pixel is there.
template <class A>
struct Meeting {
  A grad;
  int channel;
};

template <class A>
__device__ inline Meeting<A> meet(const SparseGeometry& p, const A* grad, const int* index, const InputPixel& pixel,
                                  const Tap& tap) {
  int64 h = int64(pixel.h) * p.stride[0] + tap.h, w = int64(pixel.w) * p.stride[1] + tap.w;
  if (!pixel.exists || !tap.exists || uint64(h) >= uint64(p.out_size[0]) || uint64(w) >= uint64(p.out_size[1]))
    return Meeting<A>{A(0), -1};
  return Meeting<A>{grad[pixel.image * p.out_size[1] + w],
                    index[(pixel.image * p.out_size[0] + h) * p.out_size[1] + w]};
}

// packed[tap][output channel within the group][input channel], padded with zeros, and one more row of zeros; one thread
// per element.
template <class T>
struct PackRows {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 2;

  struct Params {
    const T* weight;
    T* packed;
    int64 strides[4];
    int64 elements;
    int taps, kernel_w, in_channels, out_per_group, padded_channels;
    int unused;
  };

  __device__ static void run(const Params& p) {
    int64 element = linear_block() * kThreads + threadIdx.x;
    if (element >= p.elements) return;
    int64 row = quotient(element, p.padded_channels), tap = quotient(row, p.out_per_group);
    int64 in = element - row * p.padded_channels, out = row - tap * p.out_per_group;
    int64 tap_h = quotient(tap, p.kernel_w), tap_w = tap - tap_h * p.kernel_w;
    T value{};
    if (in < p.in_channels && tap < p.taps)
      value = p.weight[in * p.strides[0] + out * p.strides[1] + tap_h * p.strides[2] + tap_w * p.strides[3]];
    p.packed[element] = value;
  }
};

// A block computes 32 channels of 64 pixels. It looks up what its pixels meet at up to 16 taps at a time; then a team
// of 8 lanes with 4 channels each adds up rows of weights for two pixels. The results go through shared memory, so that
// neighbouring lanes write what are neighbours in memory. Blocks of the same channels run together: their rows of all
// taps and output channels (147 KB in the example above) stay in L1. Where a pixel meets nothing it adds the row of
// zeros: loads that always happen can start early, and additions need no condition.
template <class T>
struct SparseInputGradient {
  using A = Accumulator<T>;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = sizeof(A) == 8 ? 2 : 3;  // double takes two registers a value
  static constexpr int kPixels = 64, kTaps = 16;
  static constexpr int kOwn = 4;                        // channels of a lane
  static constexpr int kTeam = kSparseChannels / kOwn;  // lanes
  static constexpr int kTeams = kThreads / kTeam;
  static constexpr int kShare = kPixels / kTeams;                   // pixels of a team
  static constexpr int kWidth = sizeof(T) * kOwn <= 16 ? kOwn : 2;  // channels per load

  struct Params {
    const A* grad;
    const int* index;
    const T* packed;
    T* output;
    int64 out_strides[4];
    SparseGeometry geometry;
    int channels_last;
    int unused;
  };

  // What a pixel meets at one tap: the gradient, the row of weights, and the first input channel of the group.
  struct __align__(16) Row {
    A grad;
    unsigned number;
    int first;
  };

  struct Storage {
    union {
      Row row[kTaps][kPixels];
      A result[kSparseChannels][kPixels + 1];
    };
    int64 offset[kPixels];  // in the output; -1 if there is no such pixel
  };

  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Storage, shared);
    const SparseGeometry& geometry = p.geometry;
    int64 tiles = ceil_div(geometry.pixels, kPixels), chunk = quotient(linear_block(), tiles);
    int64 begin = (linear_block() - chunk * tiles) * kPixels;
    int channel = int(chunk) * kSparseChannels;
    if (channel >= geometry.in_channels) return;

    InputPixel pixel(geometry, begin + threadIdx.x % kPixels);
    if (threadIdx.x < kPixels) shared.offset[threadIdx.x] = pixel.exists ? pixel.offset(p.out_strides) : int64(-1);
    A sum[kShare][kOwn] = {};
    for (int tap = 0; tap < geometry.taps(); tap += kTaps) {
      int taps = minimum_of(kTaps, geometry.taps() - tap);
      for (int i = threadIdx.x / kPixels; i < taps; i += kThreads / kPixels)
        shared.row[i][threadIdx.x % kPixels] = find_row(p, pixel, tap + i, channel);
      __syncthreads();
      if (geometry.one_group())
        add_rows<true>(p, shared, sum, channel, taps);
      else
        add_rows<false>(p, shared, sum, channel, taps);
      __syncthreads();
    }
    gather(shared, sum);
    store(p, shared, channel);
  }

  // The row of zeros if no channel of this block is of the group.
  __device__ static Row find_row(const Params& p, const InputPixel& pixel, int tap, int channel) {
    const SparseGeometry& geometry = p.geometry;
    Meeting<A> met = meet(geometry, p.grad, p.index, pixel, Tap(geometry, tap));
    int group = geometry.group_of(met.channel), first = group * geometry.in_per_group;
    bool here = met.channel >= 0 && first < channel + kSparseChannels && first + geometry.in_per_group > channel;
    int row = tap * geometry.out_per_group + met.channel - group * geometry.out_per_group;
    return Row{here ? met.grad : A(0), unsigned(here ? row : geometry.taps() * geometry.out_per_group), first};
  }

  template <bool kOneGroup>
  __device__ static void add_rows(const Params& p, const Storage& shared, A (&sum)[kShare][kOwn], int channel,
                                  int taps) {
    int team = threadIdx.x / kTeam, own = channel + threadIdx.x % kTeam * kOwn;
    auto packed = reinterpret_cast<const char*>(p.packed + own);
    unsigned row_bytes = unsigned(p.geometry.padded_channels) * unsigned(sizeof(T));
    constexpr int kAtOnce = kOneGroup ? 3 : 2;  // taps whose rows are loaded together; comparisons take registers, too
#pragma unroll kAtOnce
    for (int tap = 0; tap < taps; ++tap) {
#pragma unroll
      for (int share = 0; share < kShare; ++share) {
        Row found = shared.row[tap][team + share * kTeams];
        auto row = reinterpret_cast<const Packed<T, kWidth>*>(packed + uint64(found.number) * row_bytes);
#pragma unroll
        for (int i = 0; i < kOwn; i += kWidth) {
          Packed<T, kWidth> weight = row[i / kWidth];
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            A added = sum[share][i + j] + found.grad * to_accumulator(weight.value[j]);
            bool meets = kOneGroup || unsigned(own + i + j - found.first) < unsigned(p.geometry.in_per_group);
            sum[share][i + j] = meets ? added : sum[share][i + j];
          }
        }
      }
    }
  }

  __device__ static void gather(Storage& shared, const A (&sum)[kShare][kOwn]) {
    int team = threadIdx.x / kTeam, own = threadIdx.x % kTeam * kOwn;
#pragma unroll
    for (int share = 0; share < kShare; ++share)
#pragma unroll
      for (int i = 0; i < kOwn; ++i) shared.result[own + i][team + share * kTeams] = sum[share][i];
    __syncthreads();
  }

  __device__ static void store(const Params& p, const Storage& shared, int channel) {
    int channels = minimum_of(p.geometry.in_channels - channel, kSparseChannels);
    T* output = p.output + channel * p.out_strides[1];
    if (p.channels_last) {
      int row = threadIdx.x % kSparseChannels;
#pragma unroll
      for (int i = 0; i < kPixels; i += kThreads / kSparseChannels) {
        int column = i + threadIdx.x / kSparseChannels;
        int64 offset = shared.offset[column];
        if (offset >= 0 && row < channels)
          output[offset + row * p.out_strides[1]] = from_accumulator<T>(shared.result[row][column]);
      }
    } else {
      int column = threadIdx.x % kPixels, first = threadIdx.x / kPixels;
      int64 offset = shared.offset[column];
      int left = offset >= 0 ? channels - first : 0;
      T* to = output + offset + first * p.out_strides[1];
#pragma unroll
      for (int i = 0; i < kSparseChannels; i += kThreads / kPixels) {
        if (i < left) *to = from_accumulator<T>(shared.result[i + first][column]);
        to += kThreads / kPixels * p.out_strides[1];
      }
    }
  }
};

// A block owns 32 input channels, three taps, up to 128 output channels and a slice of the pixels; each of its warps
// owns a tap. A warp keeps its sums, [output channel][input channel], in shared memory and goes through the pixels in
// order: a lane adds g x to the sum of its input channel and the pixel's output channel. All warps use the same tile of
// x, 32 channels of 32 pixels; while they do, the next one is on its way to registers. The slices' sums,
// partial[slice][tap][output channel][input channel], are added in order, in double, by a later launch.
//
// One pixel after the other would wait for shared memory three times: for what the pixel meets, for the sum, and until
// the sum is back. So pixels come in batches of four: what they meet and their x are loaded during the batch before,
// then all four sums. Where two pixels of a batch have the same sum, which is known beforehand, the later one takes it
// from the registers of the earlier one. Per pixel and tap that is 3.5 times 128 bytes of shared memory: x, the sum
// twice, half an access for what is met; and 5.25 instructions.
template <class T>
struct SparseWeightGradient {
  using A = Accumulator<T>;
  static constexpr int kWarps = 3;  // kernels of 3 x 3 leave none of them idle
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kMinBlocks = 4;
  static constexpr int kPixels = kWarp;
  static constexpr int kBatch = 4;
  static constexpr int kRows = 512 / sizeof(A);                           // output channels: 16 KB of sums per warp
  static constexpr int kNowhere = kRows * kSparseChannels;                // a row that nobody reads
  static constexpr int kSums = kNowhere + kSparseChannels;                // of a warp
  static constexpr int kLoads = (kSparseChannels + kWarps - 1) / kWarps;  // of a thread, per tile
  static constexpr int kPadding = sizeof(T) == 8 ? 2 : kBatch;            // lanes that load together use all banks

  struct Params {
    const A* grad;
    const int* index;
    const T* input;
    A* partial;
    int64 in_strides[4];
    int64 slices, slice_pixels;  // a multiple of kPixels
    SparseGeometry geometry;
    int channels_last;
    int unused;
  };

  // What a batch of pixels meets at the warp's tap: the gradient, and the place of the sums: the number of the first,
  // plus kSums for each group of input channels that begins before it in the block.
  struct __align__(16) Batch {
    A grad[kBatch];
    int place[kBatch];
  };

  struct Storage {
    A sum[kWarps][kSums];
    T x[kSparseChannels][kPixels + kPadding];
    Batch batch[kWarps][kPixels / kBatch];
  };

  // What a warp owns. Taps and channels run fastest, so that the blocks that read the same x run together.
  struct Place {
    int tap, channel, row;  // the first of each
    int group;              // of the first channel
    int64 slice;

    __device__ explicit Place(const SparseGeometry& p) {
      int64 block = linear_block();
      int64 tap_bundles = ceil_div(p.taps(), kWarps), next = quotient(block, tap_bundles);
      tap = int(block - next * tap_bundles) * kWarps + threadIdx.x / kWarp;
      block = next;
      int64 chunks = p.padded_channels / kSparseChannels;
      next = quotient(block, chunks);
      channel = int(block - next * chunks) * kSparseChannels;
      block = next;
      int64 bundles = ceil_div(p.out_per_group, kRows);
      slice = quotient(block, bundles);
      row = int(block - slice * bundles) * kRows;
      group = channel / p.in_per_group;
    }

    // To be added to a sum's place in a Batch: what is then below kSums is of the lane's group.
    __device__ int own(const SparseGeometry& p) const {
      return (group - (channel + int(threadIdx.x % kWarp)) / p.in_per_group) * kSums;
    }
  };

  // One tile on its way to shared memory: this thread's elements of x, and what pixel `lane` meets at the warp's tap.
  // As they come from memory: whatever computes with them waits for them.
  struct Staged {
    T x[kLoads];
    Meeting<A> meeting;
  };

  __device__ static void run(const Params& p) {
    RAWKERN_DYNAMIC_SHARED(Storage, shared);
    const SparseGeometry& geometry = p.geometry;
    Place place(geometry);
    if (place.slice >= p.slices) return;
    Tap tap(geometry, place.tap);
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, own = place.own(geometry);
    for (int i = lane; i < kSums; i += kWarp) shared.sum[warp][i] = A(0);
    int64 begin = place.slice * p.slice_pixels, end = minimum_of(begin + p.slice_pixels, geometry.pixels);
    InputPixel pixel(geometry, begin + lane);
    PixelStep step(geometry, kPixels);
    Staged staged;
    load(staged, p, place, tap, pixel);
    for (; begin < end; begin += kPixels) {
      unsigned repeated = store(staged, p, place, shared);
      __syncthreads();
      step.advance(pixel, geometry);
      if (begin + kPixels < end) load(staged, p, place, tap, pixel);
      if (tap.exists) {
        if (geometry.one_group())
          add_pixels<true>(shared, own, repeated);
        else
          add_pixels<false>(shared, own, repeated);
      }
      __syncthreads();
    }
    write(p, shared, place);
  }

  __device__ static void load(Staged& staged, const Params& p, const Place& place, const Tap& tap,
                              const InputPixel& pixel) {
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int channels = minimum_of(p.geometry.in_channels - place.channel, kSparseChannels);
    int64 offset = pixel.exists ? pixel.offset(p.in_strides) : int64(-1);
    if (p.channels_last) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        Element at = element<true>(i);
        int64 other = __shfl_sync(kFullMask, offset, at.pixel);
        const T* from = p.input + other + (place.channel + at.channel) * p.in_strides[1];
        staged.x[i] = other >= 0 && at.channel < channels ? *from : T{};
      }
    } else {
      const T* from = p.input + offset + (place.channel + warp) * p.in_strides[1];
      int left = pixel.exists ? channels - warp : 0;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        staged.x[i] = i * kWarps < left ? *from : T{};
        from += kWarps * p.in_strides[1];
      }
    }
    staged.meeting = meet(p.geometry, p.grad, p.index, pixel, tap);
  }

  // The element of the tile that is the thread's i-th. Lanes read neighbouring pixels, or, of channels-last memory,
  // eight channels of four pixels: then they write to different banks of shared memory, too.
  struct Element {
    int channel, pixel;
    bool exists;
  };
  template <bool kChannelsLast>
  __device__ static Element element(int i) {
    int number = i * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    bool exists = (i + 1) * kWarps <= kWarp || number < kWarp;
    if (!kChannelsLast) return Element{number, lane, exists};
    return Element{number / 8 % 4 * 8 + lane / 4, number % 8 * 4 + lane % 4, exists};
  }

  template <bool kChannelsLast>
  __device__ static void store_x(const Staged& staged, Storage& shared) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      Element at = element<kChannelsLast>(i);
      if (at.exists) shared.x[at.channel][at.pixel] = staged.x[i];
    }
  }

  // Returns which of the warp's 32 pixels have the sums of another pixel of their batch.
  __device__ static unsigned store(const Staged& staged, const Params& p, const Place& place, Storage& shared) {
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (p.channels_last)
      store_x<true>(staged, shared);
    else
      store_x<false>(staged, shared);
    int out = staged.meeting.channel, out_group = p.geometry.group_of(out), group = out_group - place.group;
    int row = out - out_group * p.geometry.out_per_group - place.row;
    bool here = out >= 0 && unsigned(row) < unsigned(kRows) && unsigned(group) < unsigned(kSparseChannels);
    int number = here ? group * kSums + row * kSparseChannels : kNowhere;
    Batch& batch = shared.batch[warp][lane / kBatch];
    batch.grad[lane % kBatch] = staged.meeting.grad;
    batch.place[lane % kBatch] = number;
    bool same = false;
#pragma unroll
    for (int i = 1; i < kBatch; ++i) same |= __shfl_xor_sync(kFullMask, number, i) == number;
    return __ballot_sync(kFullMask, same && here);
  }

  // A batch in registers: what its pixels meet, and x of the lane's channel.
  struct Loaded {
    Batch batch;
    Packed<T, kBatch> x;

    __device__ Loaded(const Storage& shared, int number)
        : batch(shared.batch[threadIdx.x / kWarp][number]),
          x(*reinterpret_cast<const Packed<T, kBatch>*>(&shared.x[threadIdx.x % kWarp][number * kBatch])) {}
  };

  template <bool kOneGroup>
  __device__ static void add_pixels(Storage& shared, int own, unsigned repeated) {
    A* sum = shared.sum[threadIdx.x / kWarp] + threadIdx.x % kWarp;
    Loaded next(shared, 0);
#pragma unroll
    for (int number = 0; number < kPixels / kBatch; ++number) {
      Loaded loaded = next;
      if (number + 1 < kPixels / kBatch) next = Loaded(shared, number + 1);
#pragma unroll
      for (int i = 0; !kOneGroup && i < kBatch; ++i) {
        loaded.batch.place[i] += own;
        if (unsigned(loaded.batch.place[i]) >= unsigned(kSums)) loaded.batch.place[i] = kNowhere;
      }
      if (repeated >> number * kBatch & ((1u << kBatch) - 1))  // the same for all lanes
        add_batch<true>(sum, loaded);
      else
        add_batch<false>(sum, loaded);
    }
  }

  template <bool kRepeated>
  __device__ static void add_batch(A* sum, const Loaded& loaded) {
    const int (&place)[kBatch] = loaded.batch.place;
    A value[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) value[i] = sum[place[i]];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int earlier = 0; kRepeated && earlier < i; ++earlier)
        value[i] = place[earlier] == place[i] ? value[earlier] : value[i];
      value[i] += loaded.batch.grad[i] * to_accumulator(loaded.x.value[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum[place[i]] = value[i];
  }

  __device__ static void write(const Params& p, const Storage& shared, const Place& place) {
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const SparseGeometry& geometry = p.geometry;
    if (place.tap >= geometry.taps() || place.channel + lane >= geometry.in_channels) return;
    int rows = minimum_of(kRows, geometry.out_per_group - place.row);
    int64 first = (place.slice * geometry.taps() + place.tap) * geometry.out_per_group + place.row;
    A* partial = p.partial + first * geometry.in_channels + place.channel + lane;
    for (int row = 0; row < rows; ++row)
      partial[int64(row) * geometry.in_channels] = shared.sum[warp][row * kSparseChannels + lane];
  }
};

// partial[slice][output channel], a slice being 32 columns of the output, of any images, times a few rows. A column's
// pixels have one gradient, so that it is enough to count each channel's pixels in it: integers, for which the order of
// additions does not matter. A lane counts in a column of its own, the warps take turns at the rows. Then a thread per
// channel adds gradient times count, column by column, in double.
template <class A>
struct SparseBiasGradient {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kColumns = kWarp;
  static constexpr int kChannels = 128;  // of a block
  static constexpr int kLoads = 8;       // on their way at the same time

  struct Params {
    const A* grad;
    const int* index;
    double* partial;
    int64 columns;             // batch * width
    int64 slices, row_slices;  // in all, of the rows
    int height, width, channels;
    int slice_rows;
  };

  struct Storage {
    int count[kChannels][kColumns];
    A grad[kColumns];
  };

  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Storage, shared);
    int64 bundles = ceil_div(p.channels, kChannels), slice = quotient(linear_block(), bundles);
    if (slice >= p.slices) return;
    int first = int(linear_block() - slice * bundles) * kChannels;
    int64 tile = quotient(slice, p.row_slices);
    int begin = int(slice - tile * p.row_slices) * p.slice_rows, end = minimum_of(begin + p.slice_rows, p.height);
    int64 column = tile * kColumns + threadIdx.x % kColumns;
    for (int i = threadIdx.x / kColumns; i < kChannels; i += kWarps) shared.count[i][threadIdx.x % kColumns] = 0;
    if (threadIdx.x < kColumns) shared.grad[threadIdx.x] = column < p.columns ? p.grad[column] : A(0);
    __syncthreads();
    if (column < p.columns) count(p, shared, column, begin, end, first);
    __syncthreads();
    int own = first + threadIdx.x;
    if (threadIdx.x < kChannels && own < p.channels) p.partial[slice * p.channels + own] = sum(shared);
  }

  __device__ static void count(const Params& p, Storage& shared, int64 column, int begin, int end, int first) {
    int64 image = quotient(column, p.width);
    const int* index = p.index + image * p.height * p.width + column - image * p.width;
    for (int row = begin + threadIdx.x / kColumns; row < end; row += kLoads * kWarps) {
      int channel[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        channel[i] = row + i * kWarps < end ? index[int64(row + i * kWarps) * p.width] - first : -1;
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (unsigned(channel[i]) < unsigned(kChannels)) atomicAdd(&shared.count[channel[i]][threadIdx.x % kColumns], 1);
    }
  }

  // Of the thread's channel. Neighbouring lanes begin at neighbouring columns: at one column all would want one bank of
  // shared memory. A gradient without pixels is left out: it may be infinite.
  __device__ static double sum(const Storage& shared) {
    double sum = 0;
#pragma unroll 8
    for (int i = 0; i < kColumns; ++i) {
      int column = (i + threadIdx.x) % kColumns, count = shared.count[threadIdx.x][column];
      if (count > 0) sum += double(count) * double(shared.grad[column]);
    }
    return sum;
  }
};

}  // namespace rawkern
