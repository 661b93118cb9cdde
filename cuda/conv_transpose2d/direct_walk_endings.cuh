// What becomes of a thread's sums in direct_walk.cuh: the endings of direct_endings.cuh for kPixels rows of kColumns
// neighbouring columns of one channel, step after step. Everything that depends on the channel is loaded once.
#pragma once
#include "direct_endings.cuh"
#include "index_space.cuh"
#include "opaque.cuh"
#include "wide_store.cuh"

namespace rawkern {

// Where a step's sums belong: row `row` + m (there are `limit` rows, none if the thread has no column) and the first
// `columns` columns; sum [m][j] at `place` + m `step` + j `column_step`.
struct WalkPlace {
  int64 place, step, column_step;
  int row, limit, columns;

  __device__ bool has(int m) const { return unsigned(row + m) < unsigned(limit); }
  __device__ bool has_all(int pixels) const { return row >= 0 && row + pixels <= limit; }
};

// Stores of kColumns neighbours: by few instructions where a step has all its rows and columns and memory is aligned,
// which is the same for all steps and asked once; one by one at the edges.
template <class T, int kColumns>
struct WalkRows {
  using A = Accumulator<T>;
  static constexpr bool kPower = (kColumns & (kColumns - 1)) == 0;
  static constexpr int kBytes = kColumns * sizeof(T) < 16 ? kColumns * sizeof(T) : 16;

  __device__ static bool together(const T* tensor, const WalkPlace& at) {
    return kPower && kColumns > 1 && at.column_step == 1 && at.columns == kColumns &&
           (reinterpret_cast<uint64>(tensor + at.place) | uint64(at.step) * sizeof(T)) % kBytes == 0;
  }

  template <int kPixels>
  __device__ static void store(T* tensor, const A (&value)[kPixels][kColumns], const WalkPlace& at, bool together) {
    T* to = tensor + at.place;
    if constexpr (kPower && kColumns > 1) {
      if (together && at.has_all(kPixels)) {
#pragma unroll
        for (int m = 0; m < kPixels; ++m) {
          store_together(to, value[m]);
          to += opaque(at.step);
        }
        return;
      }
    }
#pragma unroll
    for (int m = 0; m < kPixels; ++m) {
      T* element = to;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (at.has(m) && j < at.columns) *element = from_accumulator<T>(value[m][j]);
        element += at.column_step;
      }
      to += opaque(at.step);
    }
  }

  __device__ static void store_together(T* to, const A (&value)[kColumns]) {
    if constexpr (sizeof(T) == 8) {
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        Packed<T, 2> pair{{value[j], value[j + 1]}};
        *reinterpret_cast<Packed<T, 2>*>(to + j) = pair;
      }
    } else {
      constexpr int kWords = kBytes / 4, kEach = kBytes / sizeof(T);
#pragma unroll
      for (int j = 0; j < kColumns; j += kEach) {
        unsigned words[kWords];
#pragma unroll
        for (int i = 0; i < kEach; i += 2) {
          auto two = Two<T>::from(value[j + i], value[j + i + 1]);
#pragma unroll
          for (int w = 0; w < Two<T>::kWords; ++w) words[i * int(sizeof(T)) / 4 + w] = two.words[w];
        }
        store_words(to + j, words);
      }
    }
  }
};

// As DirectStore.
template <class T, class Chain, int kColumns>
struct WalkStore {
  using A = Accumulator<T>;
  using Params = typename DirectStore<T, Chain>::Params;
  using Rows = WalkRows<T, kColumns>;

  T *output, *saved;
  typename Chain::template Operands<T> operands;
  A bias;
  bool together;

  __device__ WalkStore(const Params& params, int64, int channel, const WalkPlace& at)
      : output(static_cast<T*>(params.output)),
        saved(static_cast<T*>(params.saved)),
        operands(params.chain, channel),
        bias(bias_of<T>(params.bias, channel)),
        together(Rows::together(output, at) && (!saved || Rows::together(saved, at))) {}

  template <int kPixels>
  __device__ void consume(A (&sum)[kPixels][kColumns], const WalkPlace& at, int64) {
#pragma unroll
    for (int m = 0; m < kPixels; ++m)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[m][j] += bias;
    if (saved) Rows::store(saved, sum, at, together);
#pragma unroll
    for (int m = 0; m < kPixels; ++m)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[m][j] = Chain::template value<T>(sum[m][j], operands);
    Rows::store(output, sum, at, together);
  }
};

// As DirectStoreWithMoments: a slot for every warp and step. The lanes of a warp have the same channel and rows.
template <class T, class Chain, int kColumns>
struct WalkStoreWithMoments {
  using A = Accumulator<T>;
  using Direct = DirectStoreWithMoments<T, Chain>;
  using Params = typename Direct::Params;
  using Rows = WalkRows<T, kColumns>;

  T* output;
  Moments* moments;
  typename Chain::template Operands<T> operands;
  A bias;
  bool together;

  __device__ WalkStoreWithMoments(const Params& params, int64 image, int channel, const WalkPlace& at)
      : output(static_cast<T*>(params.output)),
        moments(params.moments + (image * params.channels + channel) * params.slots),
        operands(params.chain, channel),
        bias(bias_of<T>(params.bias, channel)),
        together(Rows::together(output, at)) {}

  template <int kPixels>
  __device__ void consume(A (&sum)[kPixels][kColumns], const WalkPlace& at, int64 slot) {
#pragma unroll
    for (int m = 0; m < kPixels; ++m)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[m][j] = to_accumulator(from_accumulator<T>(sum[m][j] + bias));
    Rows::store(output, sum, at, together);
    A own = 0, total = 0, m2 = 0;
    int count = 0;
#pragma unroll
    for (int m = 0; m < kPixels; ++m)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        sum[m][j] = Chain::template value<T>(sum[m][j], operands);
        if (!at.has(m) || j >= at.columns) continue;
        own = sum[m][j];
        ++count;
      }
    A origin = Direct::first_of(own, count > 0);
    int total_count = warp_sum(count);
#pragma unroll
    for (int m = 0; m < kPixels; ++m)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (at.has(m) && j < at.columns) total += sum[m][j] - origin;
    total = warp_sum(total);
    A shift = total_count ? total / A(total_count) : A(0);
#pragma unroll
    for (int m = 0; m < kPixels; ++m)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (at.has(m) && j < at.columns) m2 += (sum[m][j] - origin - shift) * (sum[m][j] - origin - shift);
    m2 = warp_sum(m2);
    if (threadIdx.x % kWarp == 0)
      moments[slot] =
          total_count ? Moments{double(total_count), double(origin) + double(shift), double(m2)} : Moments{0, 0, 0};
  }
};

}  // namespace rawkern
