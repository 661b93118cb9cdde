// What becomes of a block's sums: Store writes them through a chain of pointwise functions; StoreWithMoments also
// collects the statistics that GroupNorm needs; ChannelMin keeps only the minimum over all channels.
//
// An Ending sees its block's sums tile by tile: consume() for every tile of rows (kAllRows: one block sees all rows of
// its columns, tile after tile), then finish(). `block` says which columns these are and gives each one's place in the
// output, -1 where there is none; `channel` is the first row's output channel and `rows` how many of the tile's rows
// exist. Kept is shared memory that an ending has to itself; Storage is the multiplication's, free between
// multiplications. The sums leave the registers strip by strip through shared memory, so that lanes run along the
// columns, which is how the output lies in memory, and the code for a value exists once.
#pragma once
#include "chain.cuh"
#include "gather.cuh"
#include "moments.cuh"

namespace rawkern {

template <class T>
__device__ inline Accumulator<T> bias_of(const void* bias, int64 channel) {
  return bias ? to_accumulator(static_cast<const T*>(bias)[channel]) : Accumulator<T>(0);
}

// The sum over a warp's lanes, in every lane.
template <class Value>
__device__ inline Value warp_sum(Value value) {
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(kFullMask, value, bits);
  return value;
}

// The part of each strip that belongs to this thread: one column, every kStep-th row group.
template <class Math>
struct OwnColumn {
  static constexpr int kStep = Math::kThreads / Math::kBlockN;
  __device__ static int column() { return threadIdx.x % Math::kBlockN; }
  __device__ static int share() { return threadIdx.x / Math::kBlockN; }

  // visit(row, value) for every value of this thread's column that it owns; all threads of the block call it together.
  template <class Visit>
  __device__ static void for_each(Strip<Math>& strip, typename Math::Accumulators& sum, int rows, Visit visit) {
#pragma unroll 1
    for (int i = 0; i < Math::kRows; ++i) {
      strip.fill(sum, i);
      __syncthreads();
#pragma unroll 1
      for (int group = share(); group < Math::kRowGroups; group += kStep) {
        int row = Math::row_of(group, i);
        if (row < rows) visit(row, strip.at[group][column()]);
      }
      __syncthreads();
    }
  }
};

// output = chain(sum + bias), and saved = sum + bias where the backward pass will need it. Same strides for both.
template <class Math, class Chain>
struct Store {
  using T = typename Math::Element;
  static constexpr bool kAllRows = false;
  struct Params {
    void* output;
    void* saved;
    const void* bias;
    typename Chain::Params chain;
  };
  using Storage = Strip<Math>;
  struct Kept {};

  const Params& params;
  const GatherParams& gather;

  __device__ Store(const Params& params, const GatherParams& gather, Kept&) : params(params), gather(gather) {}

  __device__ void consume(Storage& strip, const BlockColumns<Math>& block, typename Math::Accumulators& sum,
                          int channel, int rows) {
    int64 place = block.out_offset[OwnColumn<Math>::column()];
    T* output = static_cast<T*>(params.output) + place;
    T* saved = params.saved ? static_cast<T*>(params.saved) + place : nullptr;
    typename Chain::template Operands<T> operands;
    operands.load_numbers(params.chain);
    OwnColumn<Math>::for_each(strip, sum, rows, [&](int row, typename Math::Value value) {
      if (place < 0) return;
      operands.load_tensors(params.chain, channel + row);
      value += bias_of<T>(params.bias, channel + row);
      int64 at = int64(channel + row) * gather.out_strides[1];
      if (saved) saved[at] = from_accumulator<T>(value);
      output[at] = from_accumulator<T>(Chain::template value<T>(value, operands));
    });
  }

  __device__ void finish(Storage&, const BlockColumns<Math>&) {}
};

// output = sum + bias, and for every row and tile the moments of chain(output), as rounded to the element type:
// moments[(image * channels + channel) * slots + slot]. Tiles do not straddle images (GatherParams::image_span).
// A warp takes a row at a time. Deviations are taken from the row's first value, so that a large mean costs no digits,
// kept in the strip, and summed twice: for the mean, then around it.
template <class Math, class Chain>
struct StoreWithMoments {
  using T = typename Math::Element;
  using A = Accumulator<T>;
  static constexpr bool kAllRows = false;
  static constexpr int kWarps = Math::kThreads / kWarp;
  struct Params {
    void* output;
    const void* bias;
    Moments* moments;
    int64 slots;
    typename Chain::Params chain;
  };
  using Storage = Strip<Math>;
  struct Kept {};

  const Params& params;
  const GatherParams& gather;

  __device__ StoreWithMoments(const Params& params, const GatherParams& gather, Kept&)
      : params(params), gather(gather) {}

  __device__ void consume(Storage& strip, const BlockColumns<Math>& block, typename Math::Accumulators& sum,
                          int channel, int rows) {
    int64 tile = block.columns.first / Math::kBlockN, tiles_per_image = gather.image_span / Math::kBlockN;
    int64 image = tile / tiles_per_image, slot = block.columns.phase * tiles_per_image + tile % tiles_per_image;
    Moments* moments = params.moments + image * gather.groups * gather.rows * params.slots + slot;
#pragma unroll 1
    for (int i = 0; i < Math::kRows; ++i) {
      strip.fill(sum, i);
      __syncthreads();
#pragma unroll 1
      for (int group = threadIdx.x / kWarp; group < Math::kRowGroups; group += kWarps) {
        int row = Math::row_of(group, i);
        if (row >= rows || image >= gather.batch) continue;
        Moments result = store_row(strip.at[group], block.out_offset, channel + row);
        if (threadIdx.x % kWarp == 0) moments[(channel + row) * params.slots] = result;
      }
      __syncthreads();
    }
  }

  __device__ Moments store_row(A* values, const int64* offset, int channel) {
    T* output = static_cast<T*>(params.output) + int64(channel) * gather.out_strides[1];
    auto bias = bias_of<T>(params.bias, channel);
    typename Chain::template Operands<T> operands(params.chain, channel);
    // Columns that exist come first: where the first does not, none does.
    A origin = Chain::template value<T>(to_accumulator(from_accumulator<T>(values[0] + bias)), operands), total = 0;
    int count = 0;
    __syncwarp();
#pragma unroll 1
    for (int column = threadIdx.x % kWarp; column < Math::kBlockN; column += kWarp) {
      if (offset[column] < 0) break;
      T stored = from_accumulator<T>(values[column] + bias);
      output[offset[column]] = stored;
      A deviation = Chain::template value<T>(to_accumulator(stored), operands) - origin;
      values[column] = deviation;
      total += deviation;
      ++count;
    }
    int own = count;
    total = warp_sum(total);
    count = warp_sum(count);
    A shift = count ? total / A(count) : A(0), m2 = 0;
#pragma unroll 1
    for (int i = 0; i < own; ++i) {
      A deviation = values[threadIdx.x % kWarp + i * kWarp] - shift;
      m2 += deviation * deviation;
    }
    m2 = warp_sum(m2);
    return count ? Moments{double(count), double(origin) + double(shift), double(m2)} : Moments{0, 0, 0};
  }

  __device__ void finish(Storage&, const BlockColumns<Math>&) {}
};

// values[pixel] = minimum over all channels of sum + bias, index[pixel] = the channel it came from; out strides
// describe one pixel plane per image. As torch.min: the first of equal values, NaN before everything.
template <class Math>
struct ChannelMin {
  using T = typename Math::Element;
  using A = Accumulator<T>;
  using Own = OwnColumn<Math>;
  static constexpr bool kAllRows = true;
  struct Params {
    A* values;
    int* index;
    const void* bias;
  };
  using Storage = Strip<Math>;
  struct Kept {  // of each thread, the minimum among its share of its column
    A value[Math::kThreads];
    int channel[Math::kThreads];
  };

  const Params& params;
  Kept& kept;

  __device__ ChannelMin(const Params& params, const GatherParams&, Kept& kept) : params(params), kept(kept) {
    kept.value[threadIdx.x] = 0;
    kept.channel[threadIdx.x] = -1;
  }

  struct Best {
    A value;
    int channel;

    // Rows come in no particular order, so that of equals (and of NaNs) the lower channel is taken.
    __device__ void offer(A candidate, int from) {
      bool is_nan = candidate != candidate, best_is_nan = value != value, earlier = from < channel;
      bool better = is_nan ? !best_is_nan || earlier : candidate < value || (candidate == value && earlier);
      if (better || channel < 0) {
        value = candidate;
        channel = from;
      }
    }
  };

  __device__ void consume(Storage& strip, const BlockColumns<Math>&, typename Math::Accumulators& sum, int channel,
                          int rows) {
    Best best{kept.value[threadIdx.x], kept.channel[threadIdx.x]};
    Own::for_each(strip, sum, rows,
                  [&](int row, A value) { best.offer(value + bias_of<T>(params.bias, channel + row), channel + row); });
    kept.value[threadIdx.x] = best.value;
    kept.channel[threadIdx.x] = best.channel;
  }

  __device__ void finish(Storage&, const BlockColumns<Math>& block) {
    __syncthreads();
    int64 place = block.out_offset[Own::column()];
    if (Own::share() > 0 || place < 0) return;
    Best best{kept.value[threadIdx.x], kept.channel[threadIdx.x]};
    for (int thread = threadIdx.x + Math::kBlockN; thread < Math::kThreads; thread += Math::kBlockN)
      if (kept.channel[thread] >= 0) best.offer(kept.value[thread], kept.channel[thread]);
    params.values[place] = best.value;
    params.index[place] = best.channel;
  }
};

}  // namespace rawkern
