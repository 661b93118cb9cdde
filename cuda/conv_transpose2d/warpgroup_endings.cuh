// What becomes of a warpgroup's sums (warpgroup_gather.cuh): the same three endings as endings.cuh has for a block's.
//
// A warp owns 16 of a job's output channels by all its columns. It passes its sums chunk by chunk through a piece of
// shared memory of its own, so that lanes run along the output as it lies in memory, the phases of a pass interleaved,
// and no warp waits for another; only the minimum over channels has to meet. The code that ends a chunk exists once;
// several channels
// are unrolled, so that their loads and functions overlap. The sums of the columns beyond the tile
// are dropped here.
#pragma once
#include "chain.cuh"
#include "moments.cuh"
#include "warpgroup_gather.cuh"

namespace rawkern {

constexpr int kWarpRows = 16;
constexpr int kTogether = 8;  // rows whose functions overlap: more take more registers than there are

// The channels of a warp: `first` over all groups, and how many of its rows exist.
struct WarpRows {
  int first, count;

  __device__ WarpRows(const WarpgroupParams& p, int group_row, int first_row) {
    int row = first_row + threadIdx.x / kWarp % 4 * kWarpRows, left = p.rows - row;
    first = group_row + row;
    count = left < 0 ? 0 : left < kWarpRows ? left : kWarpRows;
  }
};

// A thread's accumulators belong to two of its warp's rows; their biases.
template <class T>
struct FragmentBias {
  float value[2];

  __device__ FragmentBias(const void* bias, const WarpRows& rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int row = threadIdx.x % kWarp / 4 + 8 * r;
      value[r] = bias && row < rows.count ? to_accumulator(static_cast<const T*>(bias)[rows.first + row]) : 0.0f;
    }
  }
};

// One warp's chunk: 16 rows (channels) of 32 values, kPixels base pixels of each of kPhases phases. In shared memory a
// phase's pixels lie together, as the accumulators do; lane by lane the phases are interleaved, as the output is. Rows
// are 8 words longer, which keeps the fragments' stores free of bank conflicts.
template <class Gather>
struct alignas(16) Chunk {
  static constexpr int kPhases = Gather::kPhases;
  static constexpr int kPixels = kWarp / kPhases, kStride = kWarp + 8;
  static constexpr int kCount = Gather::kPixels / kPixels;

  float at[kWarpRows][kStride];

  // The column in shared memory of an output column, and the other way round.
  __device__ static int place_of(int column) { return column % kPhases * kPixels + column / kPhases; }
  __device__ static int column_at(int place) { return place % kPixels * kPhases + place / kPixels; }

  // Writes chunk `chunk` of the sums, with their biases. Registers are indexed by constants, the loop over chunks stays
  // rolled.
  template <class Bias>
  __device__ void fill(const float (&sum)[kPhases][Gather::kPixels / 2], int chunk, const Bias& bias) {
    struct alignas(8) Pair {
      float values[2];
    };
    int row = threadIdx.x % kWarp / 4, pixel = threadIdx.x % 4 * 2;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if (c != chunk) continue;
#pragma unroll
      for (int i = 0; i < kPhases; ++i)
#pragma unroll
        for (int j = 0; j < kPixels / 8; ++j)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float* from = &sum[i][(c * (kPixels / 8) + j) * 4 + r * 2];
            *reinterpret_cast<Pair*>(&at[row + 8 * r][i * kPixels + 8 * j + pixel]) =
                Pair{{from[0] + bias.value[r], from[1] + bias.value[r]}};
          }
    }
  }

  // The value of row 0 in this lane's output column; rows are kStride apart.
  __device__ float* column() { return &at[0][place_of(threadIdx.x % kWarp)]; }
};

// Where the values of a chunk go: each lane has a column, the output of a base pixel in one phase.
template <class Gather>
struct OutColumns {
  const WarpgroupParams& p;
  const TilePlace& tile;
  Divisor pitch;
  int phase_h, phase_w;

  __device__ OutColumns(const WarpgroupParams& p, const TilePlace& tile, const Job& job)
      : p(p), tile(tile), pitch(p.pitch), phase_h(p.phase[job.pass][0]), phase_w(p.phase[job.pass][1]) {}

  // The place of this lane's column, channel 0, in elements; -1 where there is no such pixel.
  __device__ int64 place(int chunk) const {
    int lane = threadIdx.x % kWarp, column, image, at_row;
    int row = pitch.divide(chunk * Chunk<Gather>::kPixels + lane / Gather::kPhases, column);
    tile.locate(p, row, image, at_row);
    int base = tile.column + column;
    int h = p.out_step[0] * at_row + phase_h, w = p.out_step[1] * base + phase_w + lane % Gather::kPhases;
    bool exists = row < p.tile_rows && column < p.tile_columns && image < p.batch && at_row < p.base_size[0] &&
                  base < p.base_size[1] && h < p.out_size[0] && w < p.out_size[1];
    return exists ? image * p.out_strides[0] + h * p.out_strides[2] + w * p.out_strides[3] : int64(-1);
  }
};

// output = chain(sum + bias), and saved = sum + bias where the backward pass will need it. Same strides for both.
template <class T, class Chain>
struct WarpgroupStore {
  static constexpr bool kAllRows = false;
  static constexpr int kRawDepth = 4;
  using Operands = typename Chain::template Operands<T>;
  struct Params {
    void* output;
    void* saved;
    const void* bias;
    typename Chain::Params chain;
  };
  template <class Gather>
  struct Storage {
    Chunk<Gather> chunks[Gather::kConsumerWarps];
  };

  const Params& params;
  const WarpgroupParams& gather;
  Operands operands;

  __device__ WarpgroupStore(const Params& params, const WarpgroupParams& gather) : params(params), gather(gather) {
    operands.load_numbers(params.chain);
  }

  template <class Gather>
  __device__ void consume(Storage<Gather>& storage, float (&sum)[Gather::kPhases][Gather::kPixels / 2],
                          const TilePlace& tile, const Job& job, int group_row, int first_row) {
    Chunk<Gather>& chunk = storage.chunks[threadIdx.x / kWarp];
    WarpRows rows(gather, group_row, first_row);
    FragmentBias<T> bias(params.bias, rows);
    OutColumns<Gather> columns(gather, tile, job);
#pragma unroll 1
    for (int i = 0; i < Chunk<Gather>::kCount; ++i) {
      chunk.fill(sum, i, bias);
      int64 place = columns.place(i);
      __syncwarp();
      if (params.saved)
        store<true>(chunk, place, rows);
      else
        store<false>(chunk, place, rows);
      __syncwarp();
    }
  }

  template <bool kSave, class Chunk>
  __device__ void store(Chunk& chunk, int64 place, const WarpRows& rows) {
    if (gather.out_strides[1] == 1)
      store_by_channel<kSave>(chunk, place, rows);
    else
      store_by_pixel<kSave>(chunk, place, rows);
  }

  template <bool kSave>
  __device__ void write(int64 place, float value) const {
    if (kSave) static_cast<T*>(params.saved)[place] = from_accumulator<T>(value);
    static_cast<T*>(params.output)[place] = from_accumulator<T>(Chain::template value<T>(value, operands));
  }

  // A lane stores its column, channel by channel.
  template <bool kSave, class Chunk>
  __device__ void store_by_pixel(Chunk& chunk, int64 place, const WarpRows& rows) {
    if (place < 0) return;
    place += rows.first * gather.out_strides[1];
    const float* column = chunk.column();
    int row = 0;
#pragma unroll 1
    for (; row + kTogether <= rows.count; row += kTogether)
      store_rows<kSave, kTogether>(column + row * Chunk::kStride, Chunk::kStride, rows.first + row, place);
#pragma unroll 1
    for (; row < rows.count; ++row)
      store_rows<kSave, 1>(column + row * Chunk::kStride, Chunk::kStride, rows.first + row, place);
  }

  template <bool kSave, int kCount>
  __device__ void store_rows(const float* column, int step, int channel, int64& place) {
    float values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = column[i * step];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      operands.load_tensors(params.chain, channel + i);
      write<kSave>(place, values[i]);
      place += gather.out_strides[1];
    }
  }

  // Half a warp stores one column: a lane has one channel of every other column.
  template <bool kSave, class Chunk>
  __device__ void store_by_channel(const Chunk& chunk, int64 place, const WarpRows& rows) {
    int row = threadIdx.x % kWarpRows, half = threadIdx.x % kWarp / kWarpRows;
    if (row < rows.count) operands.load_tensors(params.chain, rows.first + row);
#pragma unroll 1
    for (int first = half; first < kWarp; first += 2 * kTogether) {
      float values[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) values[i] = chunk.at[row][Chunk::place_of(first + 2 * i)];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        int64 to = __shfl_sync(kFullMask, place, first + 2 * i);
        if (to >= 0 && row < rows.count) write<kSave>(to + rows.first + row, values[i]);
      }
    }
  }
};

// output = sum + bias, and for every channel and tile the moments of chain(output), as rounded to the element type:
// moments[(image * channels + channel) * slots + slot]. Tiles do not straddle images (`stack` is a multiple of
// `tile_rows`). Two lanes share a channel, each with half of every chunk's columns: the deviations from the channel's
// first value, so that a large mean costs no digits, are summed twice, for the chunk's mean and around it, and chunks
// are combined as in moments.cuh.
template <class T, class Chain>
struct WarpgroupStoreWithMoments {
  static constexpr bool kAllRows = false;
  static constexpr int kRawDepth = 4;
  static constexpr int kHalf = kWarp / 2;
  struct Params {
    void* output;
    const void* bias;
    Moments* moments;
    int64 slots;
    typename Chain::Params chain;
  };
  template <class Gather>
  struct Storage {
    Chunk<Gather> chunks[Gather::kConsumerWarps];
  };

  // Of the values seen so far, relative to the first of them.
  struct Running {
    float origin = 0, count = 0, mean = 0, m2 = 0;

    __device__ void add(const float* half, unsigned exists) {
      if (!exists) return;
      if (count == 0) origin = half[__ffs(exists) - 1];
      float values[kHalf], total = 0, squares = 0, added = float(__popc(exists));
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        values[i] = exists >> i & 1 ? half[i] - origin : 0.0f;
        total += values[i];
      }
      float center = total / added;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        float deviation = exists >> i & 1 ? values[i] - center : 0.0f;
        squares += deviation * deviation;
      }
      float both = count + added, delta = center - mean, share = added / both;
      m2 += squares + delta * delta * count * share;
      mean += delta * share;
      count = both;
    }
  };

  const Params& params;
  const WarpgroupParams& gather;
  typename Chain::template Operands<T> operands;

  __device__ WarpgroupStoreWithMoments(const Params& params, const WarpgroupParams& gather)
      : params(params), gather(gather) {
    operands.load_numbers(params.chain);
  }

  template <class Gather>
  __device__ void consume(Storage<Gather>& storage, float (&sum)[Gather::kPhases][Gather::kPixels / 2],
                          const TilePlace& tile, const Job& job, int group_row, int first_row) {
    Chunk<Gather>& chunk = storage.chunks[threadIdx.x / kWarp];
    WarpRows rows(gather, group_row, first_row);
    FragmentBias<T> bias(params.bias, rows);
    OutColumns<Gather> columns(gather, tile, job);
    int lane = threadIdx.x % kWarp, half = lane % 2 * kHalf;
    Running running;
#pragma unroll 1
    for (int i = 0; i < Chunk<Gather>::kCount; ++i) {
      chunk.fill(sum, i, bias);
      int64 place = columns.place(i);
      int existing = __shfl_sync(kFullMask, int(place >= 0), Chunk<Gather>::column_at(lane));
      unsigned exists = __ballot_sync(kFullMask, existing);
      __syncwarp();
      if (gather.out_strides[1] == 1)
        store_by_channel(chunk, place, rows);
      else
        store_by_pixel(chunk.column(), Chunk<Gather>::kStride, place, rows);
      __syncwarp();
      running.add(&chunk.at[lane / 2][half], exists >> half & ((1u << kHalf) - 1));
      __syncwarp();
    }
    int tiles_per_image = gather.stack / gather.tile_rows;
    int64 slot = tile.row_tile % tiles_per_image * gather.column_tiles + tile.column_tile;
    slot = slot * gather.passes + job.pass;
    Moments own{running.count, double(running.origin) + double(running.mean), running.m2}, other;
    other.count = __shfl_xor_sync(kFullMask, own.count, 1);
    other.mean = __shfl_xor_sync(kFullMask, own.mean, 1);
    other.m2 = __shfl_xor_sync(kFullMask, own.m2, 1);
    if (lane % 2 == 0 && lane / 2 < rows.count) {
      int64 channel = int64(tile.image) * gather.groups * gather.rows + rows.first + lane / 2;
      params.moments[channel * params.slots + slot] = combine(own, other);
    }
  }

  // Both store the sums and leave what the chain makes of them in their place: a lane its column, channel by channel,
  // or half a warp one column.
  __device__ void store_by_pixel(float* column, int step, int64 place, const WarpRows& rows) {
    if (place < 0) return;
    T* output = static_cast<T*>(params.output) + place + rows.first * gather.out_strides[1];
    int row = 0;
#pragma unroll 1
    for (; row + kTogether <= rows.count; row += kTogether)
      store_rows<kTogether>(column + row * step, step, rows.first + row, output);
#pragma unroll 1
    for (; row < rows.count; ++row) store_rows<1>(column + row * step, step, rows.first + row, output);
  }

  template <class Chunk>
  __device__ void store_by_channel(Chunk& chunk, int64 place, const WarpRows& rows) {
    int row = threadIdx.x % kWarpRows, half = threadIdx.x % kWarp / kWarpRows;
    if (row < rows.count) operands.load_tensors(params.chain, rows.first + row);
    T* output = static_cast<T*>(params.output) + rows.first + row;
#pragma unroll 1
    for (int first = half; first < kWarp; first += 2 * kTogether) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        int64 to = __shfl_sync(kFullMask, place, first + 2 * i);
        float& value = chunk.at[row][Chunk::place_of(first + 2 * i)];
        T stored = from_accumulator<T>(value);
        if (to >= 0 && row < rows.count) output[to] = stored;
        value = Chain::template value<T>(to_accumulator(stored), operands);
      }
    }
  }

  template <int kCount>
  __device__ void store_rows(float* column, int step, int channel, T*& output) {
    float values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = column[i * step];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      operands.load_tensors(params.chain, channel + i);
      T stored = from_accumulator<T>(values[i]);
      *output = stored;
      output += gather.out_strides[1];
      values[i] = Chain::template value<T>(to_accumulator(stored), operands);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) column[i * step] = values[i];
  }
};

// values[pixel] = minimum over all channels of sum + bias, index[pixel] = the channel it came from; out strides
// describe one pixel plane per image. As torch.min: the first of equal values, NaN before everything. A lane finds the
// minimum of its column among the warp's channels; the consumer's four warps meet once per job, and the best of the
// units so far waits in shared memory for the next.
template <class T>
struct WarpgroupChannelMin {
  static constexpr bool kAllRows = true;
  static constexpr int kRawDepth = 2;  // shared memory has no room for more
  struct Params {
    float* values;
    int* index;
    const void* bias;
  };

  // Channels are offered in rising order.
  struct Best {
    float value;
    int channel;
    __device__ void offer(float candidate, int from) {
      bool better = candidate < value || (candidate != candidate && value == value) || channel < 0;
      value = better ? candidate : value;
      channel = better ? from : channel;
    }
  };
  template <class Gather>
  struct Storage {
    Chunk<Gather> chunks[Gather::kConsumerWarps];
    Best of_warp[Gather::kConsumerWarps][Gather::kPhases * Gather::kPixels];
    Best so_far[Gather::kConsumers][Gather::kPhases * Gather::kPixels];
  };

  const Params& params;
  const WarpgroupParams& gather;

  __device__ WarpgroupChannelMin(const Params& params, const WarpgroupParams& gather)
      : params(params), gather(gather) {}

  template <class Gather>
  __device__ void consume(Storage<Gather>& storage, float (&sum)[Gather::kPhases][Gather::kPixels / 2],
                          const TilePlace& tile, const Job& job, int group_row, int first_row) {
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    Chunk<Gather>& chunk = storage.chunks[warp];
    WarpRows rows(gather, group_row, first_row);
    FragmentBias<T> bias(params.bias, rows);
#pragma unroll 1
    for (int i = 0; i < Chunk<Gather>::kCount; ++i) {
      chunk.fill(sum, i, bias);
      __syncwarp();
      storage.of_warp[warp][i * kWarp + lane] = smallest(chunk, rows);
      __syncwarp();
    }
    named_barrier(1 + job.consumer, kWarpgroup);
    OutColumns<Gather> columns(gather, tile, job);
    for (int i = warp % 4; i < Chunk<Gather>::kCount; i += 4) {
      Best& so_far = storage.so_far[job.consumer][i * kWarp + lane];
      Best best = job.unit == 0 ? Best{0, -1} : so_far;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        Best of_warp = storage.of_warp[warp / 4 * 4 + w][i * kWarp + lane];
        if (of_warp.channel >= 0) best.offer(of_warp.value, of_warp.channel);
      }
      so_far = best;
      if (job.unit == gather.units * gather.groups - 1) write(best, columns.place(i));
    }
    named_barrier(1 + job.consumer, kWarpgroup);
  }

  template <class Chunk>
  __device__ static Best smallest(Chunk& chunk, const WarpRows& rows) {
    float values[kWarpRows];
    const float* column = chunk.column();
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) values[row] = column[row * Chunk::kStride];
    Best best{0, -1};
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row)
      if (row < rows.count) best.offer(values[row], rows.first + row);
    return best;
  }

  __device__ void write(const Best& best, int64 place) const {
    if (place < 0) return;
    params.values[place] = best.value;
    params.index[place] = best.channel;
  }
};

}  // namespace rawkern
