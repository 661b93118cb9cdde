// What becomes of a thread's sums in the direct kernels (direct.cuh, direct_tile.cuh): the endings of endings.cuh for
// sums that lie in registers, kRows output channels by kPixels output rows of one column.
//
// consume() is called for every tile of channels in ascending order (kAllRows: one thread sees all channels of its
// pixels), then finish(). The lanes of a warp have the same channels, so that an ending may combine them.
#pragma once
#include "endings.cuh"
#include "opaque.cuh"

namespace rawkern {

// Where a thread's sums belong: channels [channel, channel + rows) of an image, pixels [first, end) of its kPixels
// (none if first >= end), pixel m at `place` + m `step` in channel 0.
struct DirectPlace {
  int64 image, place, step;
  int channel, rows, first, end;

  __device__ bool has(int pixel) const { return pixel >= first && pixel < end; }
};

// The place of the next pixel, by a sum: in bytes, as elements would be summed up first and then scaled each time.
template <class T>
__device__ inline T* next_pixel(T* at, int64 step) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(at) + opaque(step * int64(sizeof(T))));
}

// Stores the pixels of one channel.
template <class T, int kPixels>
__device__ inline void store_pixels(T* to, const Accumulator<T> (&value)[kPixels], const DirectPlace& at) {
#pragma unroll
  for (int m = 0; m < kPixels; ++m, to = next_pixel(to, at.step))
    if (at.has(m)) *to = from_accumulator<T>(value[m]);
}

// output = chain(sum + bias), and saved = sum + bias where the backward pass will need it. Same strides for both.
template <class T, class Chain>
struct DirectStore {
  static constexpr bool kAllRows = false;
  using A = Accumulator<T>;
  struct Params {
    void* output;
    void* saved;
    const void* bias;
    typename Chain::Params chain;
  };

  const Params& params;
  int64 channel_stride;

  __device__ DirectStore(const Params& params, int64 channel_stride) : params(params), channel_stride(channel_stride) {}

  template <int kRows, int kPixels>
  __device__ void consume(A (&sum)[kRows][kPixels], const DirectPlace& at, int64) {
    typename Chain::template Operands<T> operands;
    operands.load_numbers(params.chain);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= at.rows) break;
      int channel = at.channel + row;
      operands.load_tensors(params.chain, channel);
      A bias = bias_of<T>(params.bias, channel);
      int64 place = at.place + channel * channel_stride;
#pragma unroll
      for (int m = 0; m < kPixels; ++m) sum[row][m] += bias;
      if (params.saved) store_pixels(static_cast<T*>(params.saved) + place, sum[row], at);
      // One pixel's function after the other, lest long ones want registers all at once.
      T* output = static_cast<T*>(params.output) + place;
#pragma unroll
      for (int m = 0; m < kPixels; ++m, output = next_pixel(output, at.step))
        if (at.has(m)) *output = from_accumulator<T>(Chain::template value<T>(sum[row][m], operands));
    }
  }

  __device__ void finish(const DirectPlace&) {}
};

// output = sum + bias, and for every channel and warp the moments of chain(output), as rounded to the element type:
// moments[(image * channels + channel) * slots + slot]. Deviations are taken from the warp's first value, so that a
// large mean costs no digits, and summed twice: for the mean, then around it. All lanes of a warp call together.
template <class T, class Chain>
struct DirectStoreWithMoments {
  static constexpr bool kAllRows = false;
  using A = Accumulator<T>;
  struct Params {
    void* output;
    const void* bias;
    Moments* moments;
    int64 slots;
    int64 channels;  // of an image
    typename Chain::Params chain;
  };

  const Params& params;
  int64 channel_stride;

  __device__ DirectStoreWithMoments(const Params& params, int64 channel_stride)
      : params(params), channel_stride(channel_stride) {}

  template <int kRows, int kPixels>
  __device__ void consume(A (&sum)[kRows][kPixels], const DirectPlace& at, int64 slot) {
    T* output = static_cast<T*>(params.output) + at.place;
    Moments* moments = params.moments + (at.image * params.channels + at.channel) * params.slots + slot;
    int count = at.end > at.first ? at.end - at.first : 0;
    int total_count = warp_sum(count);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= at.rows) break;
      typename Chain::template Operands<T> operands(params.chain, at.channel + row);
      A bias = bias_of<T>(params.bias, at.channel + row);
      T* to = output + (at.channel + row) * channel_stride;
      A own = 0;
#pragma unroll
      for (int m = 0; m < kPixels; ++m, to = next_pixel(to, at.step)) {
        if (!at.has(m)) continue;
        T stored = from_accumulator<T>(sum[row][m] + bias);
        *to = stored;
        sum[row][m] = Chain::template value<T>(to_accumulator(stored), operands);
        own = sum[row][m];
      }
      A origin = first_of(own, count > 0), total = 0, m2 = 0;
#pragma unroll
      for (int m = 0; m < kPixels; ++m)
        if (at.has(m)) total += sum[row][m] - origin;
      total = warp_sum(total);
      A shift = total_count ? total / A(total_count) : A(0);
#pragma unroll
      for (int m = 0; m < kPixels; ++m)
        if (at.has(m)) m2 += (sum[row][m] - origin - shift) * (sum[row][m] - origin - shift);
      m2 = warp_sum(m2);
      if (threadIdx.x % kWarp == 0)
        moments[row * params.slots] =
            total_count ? Moments{double(total_count), double(origin) + double(shift), double(m2)} : Moments{0, 0, 0};
    }
  }

  // The value of the first lane that has one.
  __device__ static A first_of(A value, bool exists) {
    unsigned lanes = __ballot_sync(kFullMask, exists);
    int lane = 0;
    while (lanes && !(lanes >> lane & 1)) ++lane;
    return __shfl_sync(kFullMask, value, lane);
  }

  __device__ void finish(const DirectPlace&) {}
};

// values[pixel] = minimum over all channels of sum + bias, index[pixel] = the channel it came from; out strides
// describe one pixel plane per image. As torch.min: the first of equal values, NaN before everything.
template <class T, int kPixels>
struct DirectChannelMin {
  static constexpr bool kAllRows = true;
  using A = Accumulator<T>;
  struct Params {
    A* values;
    int* index;
    const void* bias;
  };

  const Params& params;
  A best[kPixels];
  int channel[kPixels];

  __device__ DirectChannelMin(const Params& params, int64) : params(params) {
#pragma unroll
    for (int m = 0; m < kPixels; ++m) {
      best[m] = 0;
      channel[m] = -1;
    }
  }

  template <int kRows>
  __device__ void consume(A (&sum)[kRows][kPixels], const DirectPlace& at, int64) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= at.rows) break;
      A bias = bias_of<T>(params.bias, at.channel + row);
#pragma unroll
      for (int m = 0; m < kPixels; ++m) {
        A value = sum[row][m] + bias;
        // Channels come in ascending order: of equals (and of NaNs) the first stays.
        if (channel[m] < 0 || (best[m] == best[m] && !(value >= best[m]))) {
          best[m] = value;
          channel[m] = at.channel + row;
        }
      }
    }
  }

  __device__ void finish(const DirectPlace& at) {
#pragma unroll
    for (int m = 0; m < kPixels; ++m) {
      if (!at.has(m)) continue;
      params.values[at.place + m * at.step] = best[m];
      params.index[at.place + m * at.step] = channel[m];
    }
  }
};

}  // namespace rawkern
