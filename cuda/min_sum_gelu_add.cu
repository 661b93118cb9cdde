// Minimum over channels, sum over height, GELU, plus bias: (N, C, H, W) -> (N, 1, 1, W) + bias, and the way back.
//
//   MinOfPlanes, MinOfNeighbours   the minimum over channels and where it is, (N, H, W) each; for channels that lie
//                                  planes apart in memory, and for channels that are neighbours (channels-last)
//   Reduce                         sums over any dimensions of an array; times GELU's derivative where asked for
//   GeluAdd                        gelu(sum) + bias, broadcast against each other
//   SpreadPlanes, SpreadNeighbours the gradient of the input: the gradient of the sum where the minimum was, else zero
//
// Min and Spread move the large tensor once and nothing else of size: their floor is the memory's bandwidth (16 x 128 x
// 256 x 256 floats: 0.54 GB, 0.13 ms on an H200). Arithmetic is 4 instructions per element, 16-byte loads and stores
// wherever alignment allows, 64 to 128 bytes under way per thread. Reduce and GeluAdd work on 1/C of that.
// Deterministic.
#include "index_space.cuh"
#include "pointwise_functions.cuh"

namespace rawkern {

// Whether a value, from a later channel, takes the place of the smallest so far: the first of equals stays, and NaN
// precedes everything.
template <class A>
__device__ inline bool replaces(A value, A smallest) {
  return !(value >= smallest) && smallest == smallest;
}

// The smallest value so far and its channel. Begins as +infinity at the first channel to be seen, which is the answer
// if nothing is smaller.
template <class A>
struct Smallest {
  A value;
  int channel;

  __device__ void begin(int first) {
    value = A(__uint_as_float(0x7f800000u));
    channel = first;
  }
  __device__ void see(A candidate, int from) {
    if (replaces(candidate, value)) {
      value = candidate;
      channel = from;
    }
  }
  // Takes another's place in no order: among equals the lower channel wins.
  __device__ void merge(A candidate, int from) {
    bool equal = candidate == value || (candidate != candidate && value != value);
    if (equal ? from < channel : replaces(candidate, value)) {
      value = candidate;
      channel = from;
    }
  }
};

template <class T>
struct MinParams {
  const T* input;
  Accumulator<T>* values;
  int* index;            // or null
  IndexSpace<2> pixels;  // in the input, in the outputs
  int64 channel_stride;
  int channels;
  int share;   // a power of two: MinOfPlanes: threads that share a pixel's channels; MinOfNeighbours: lanes
  int vector;  // whether 16 bytes at a time are aligned and of one kind
  int unused;
};

// A thread takes kWidth pixels and every `share`th channel; neighbouring threads take what lies next to that. The
// pixels are neighbours, a pack of 16 bytes, where that is aligned in every channel (packs); otherwise they lie a warp
// apart, so that the lanes of a warp still read neighbours and a thread has as many bytes under way (singles). The
// threads that share pixels meet in shared memory.
template <class T>
struct MinOfPlanes {
  using A = Accumulator<T>;
  using Params = MinParams<T>;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 3;
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kLoads = sizeof(T) == 2 ? 4 : 8;   // each of 16 bytes in all, beside kWidth minima
  static constexpr int kRow = kThreads + kWarp / kWidth;  // spreads a pixel's neighbours over the banks

  struct Storage {
    A value[kWidth][kRow];
    int channel[kWidth][kRow];
  };

  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Storage, shared);
    if (p.vector)
      run_packs(p, shared);
    else
      run_singles(p, shared);
  }

  __device__ static void run_packs(const Params& p, Storage& shared) {
    int packs = kThreads / p.share, pack = threadIdx.x & (packs - 1), first = threadIdx.x / packs;
    int64 begin = linear_block() * packs * kWidth, pixel = begin + pack * kWidth;
    Smallest<A> smallest[kWidth];
    start(smallest, first);
    if (pixel < p.pixels.count) {
      int64 offset[2];
      p.pixels.locate(pixel, offset);
      see_channels(p, Pack{p.input + offset[0]}, first, smallest);
    }
    leave(shared, smallest);
    __syncthreads();
    for (int i = threadIdx.x; i < packs * kWidth; i += kThreads) {
      if (begin + i >= p.pixels.count) break;
      store(p, begin + i, meet(p, shared, i % kWidth, i / kWidth));
    }
  }

  __device__ static void run_singles(const Params& p, Storage& shared) {
    // Members of a team, which share pixels, are in different warps.
    int teams = kThreads / p.share, team = threadIdx.x & (teams - 1), first = threadIdx.x / teams;
    int64 begin = (linear_block() * teams + team / kWarp * kWarp) * kWidth;  // of the warp's pixels
    int lane = threadIdx.x % kWarp;
    int64 size = p.pixels.sizes[p.pixels.dims - 1], in_row = begin - quotient(begin, size) * size;
    bool one_row = in_row + kWarp * kWidth <= size && p.pixels.step(0) == 1 && begin < p.pixels.count;
    if (one_row) {
      int64 offset[2];
      p.pixels.locate(begin, offset);
      Smallest<A> smallest[kWidth];
      start(smallest, first);
      see_channels(p, Row{p.input + offset[0] + lane}, first, smallest);
      if (p.share == 1) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          int64 place = offset[1] + (i * kWarp + lane) * p.pixels.step(1);
          p.values[place] = smallest[i].value;
          if (p.index) p.index[place] = smallest[i].channel;
        }
        return;
      }
      leave(shared, smallest);
    } else {
#pragma unroll 1
      for (int i = 0; i < kWidth; ++i) {
        int64 offset[2], pixel = begin + i * kWarp + lane;
        Smallest<A> smallest[1];
        start(smallest, first);
        if (pixel < p.pixels.count) {
          p.pixels.locate(pixel, offset);
          see_channels(p, Single{p.input + offset[0]}, first, smallest);
        }
        shared.value[i][threadIdx.x] = smallest[0].value;
        shared.channel[i][threadIdx.x] = smallest[0].channel;
      }
    }
    if (p.share > 1) __syncthreads();  // otherwise nobody reads what another thread left
    for (int i = first; i < kWidth; i += p.share) {
      int64 pixel = begin + i * kWarp + lane;
      if (pixel < p.pixels.count) store(p, pixel, meet(p, shared, i, team));
    }
  }

  // How a thread's values of a channel are loaded, `distance` from those of channel 0.
  struct Pack {
    const T* input;
    __device__ void load(int64 distance, T (&values)[kWidth]) const {
      Packed<T, kWidth> pack = *reinterpret_cast<const Packed<T, kWidth>*>(input + distance);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[i] = pack.value[i];
    }
  };
  struct Row {
    const T* input;
    __device__ void load(int64 distance, T (&values)[kWidth]) const {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[i] = input[distance + i * kWarp];
    }
  };
  struct Single {
    const T* input;
    __device__ void load(int64 distance, T (&values)[1]) const { values[0] = input[distance]; }
  };

  template <class Places, int kCount>
  __device__ static void see_channels(const Params& p, const Places& places, int first,
                                      Smallest<A> (&smallest)[kCount]) {
    int64 step = p.share * p.channel_stride, distance = first * p.channel_stride;
    for (int channel = first; channel < p.channels; channel += kLoads * p.share) {
      T loaded[kLoads][kCount];
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        if (channel + load * p.share < p.channels) places.load(distance, loaded[load]);
        distance += step;
      }
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        int from = channel + load * p.share;
        if (from >= p.channels) continue;
#pragma unroll
        for (int i = 0; i < kCount; ++i) smallest[i].see(to_accumulator(loaded[load][i]), from);
      }
    }
  }

  template <int kCount>
  __device__ static void start(Smallest<A> (&smallest)[kCount], int first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) smallest[i].begin(first);
  }
  __device__ static void leave(Storage& shared, const Smallest<A> (&smallest)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      shared.value[i][threadIdx.x] = smallest[i].value;
      shared.channel[i][threadIdx.x] = smallest[i].channel;
    }
  }
  // The minimum over what a team left for its i-th pixel.
  __device__ static Smallest<A> meet(const Params& p, const Storage& shared, int i, int team) {
    Smallest<A> all{shared.value[i][team], shared.channel[i][team]};
    for (int other = 1; other < p.share; ++other) {
      int place = team + other * (kThreads / p.share);
      all.merge(shared.value[i][place], shared.channel[i][place]);
    }
    return all;
  }
  __device__ static void store(const Params& p, int64 pixel, const Smallest<A>& smallest) {
    int64 offset[2];
    p.pixels.locate(pixel, offset);
    p.values[offset[1]] = smallest.value;
    if (p.index) p.index[offset[1]] = smallest.channel;
  }
};

// A team of `share` neighbouring lanes takes a pixel, each lane every `share`th pack of its channels.
template <class T>
struct MinOfNeighbours {
  using A = Accumulator<T>;
  using Params = MinParams<T>;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 3;
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kLoads = 4;

  __device__ static void run(const Params& p) {
    int lane = threadIdx.x & (p.share - 1);
    int64 pixel = linear_block() * (kThreads / p.share) + threadIdx.x / p.share;
    bool exists = pixel < p.pixels.count;
    int64 offset[2] = {0, 0};
    if (exists) p.pixels.locate(pixel, offset);
    Smallest<A> smallest;
    smallest.begin(lane * (p.vector ? kWidth : 1));
    if (exists) {
      if (p.vector)
        see_channels<kWidth>(p, p.input + offset[0], lane, smallest);
      else
        see_channels<1>(p, p.input + offset[0], lane, smallest);
    }
    for (int distance = 1; distance < p.share; distance *= 2) {
      A value = __shfl_xor_sync(kFullMask, smallest.value, distance);
      int channel = __shfl_xor_sync(kFullMask, smallest.channel, distance);
      smallest.merge(value, channel);
    }
    if (!exists || lane > 0) return;
    p.values[offset[1]] = smallest.value;
    if (p.index) p.index[offset[1]] = smallest.channel;
  }

  template <int kPack>
  __device__ static void see_channels(const Params& p, const T* input, int lane, Smallest<A>& smallest) {
    for (int channel = lane * kPack; channel < p.channels; channel += kLoads * p.share * kPack) {
      Packed<T, kPack> loaded[kLoads];
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        int from = channel + load * p.share * kPack;
        if (from < p.channels)
          loaded[load] = *reinterpret_cast<const Packed<T, kPack>*>(input + from * p.channel_stride);
      }
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        int from = channel + load * p.share * kPack;
        if (from >= p.channels) continue;
#pragma unroll
        for (int i = 0; i < kPack; ++i) smallest.see(to_accumulator(loaded[load].value[i]), from + i);
      }
    }
  }
};

// output[k] = sum over r of input[k, r], in double; with kGelu also times the derivative of GELU at x[k].
//
// A block computes kThreads / share outputs, `share` threads each (both powers of two), for one slice of the r; the
// threads that lie next to each other walk along the outputs or along the r, whichever lie next to each other in
// memory. Slices are for few outputs of many terms: a second launch sums the slices' results.
template <class Input, class Output, bool kGelu>
struct Reduce {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 3;

  struct Params {
    const Input* input;
    Output* output;
    const Output* x;
    IndexSpace<2> kept;  // in the input, in the output
    IndexSpace<1> reduced;
    int64 slices, slice_length;
    int share;
    int along_reduced;  // which way neighbouring threads walk
  };

  struct Storage {
    double sum[kThreads];
  };

  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Storage, shared);
    int outputs = kThreads / p.share;
    int member = p.along_reduced ? threadIdx.x & (p.share - 1) : threadIdx.x / outputs;
    int own = p.along_reduced ? threadIdx.x / p.share : threadIdx.x & (outputs - 1);
    int distance = p.along_reduced ? 1 : outputs;  // of members, in threads
    int64 bundles = ceil_div(p.kept.count, outputs), slice = quotient(linear_block(), bundles);
    if (slice >= p.slices) return;
    int64 output = (linear_block() - slice * bundles) * outputs + own;
    int64 begin = slice * p.slice_length, end = minimum_of(begin + p.slice_length, p.reduced.count);
    int64 offset[2] = {0, 0};
    double sum = 0;
    if (output < p.kept.count) {
      p.kept.locate(output, offset);
      sum = sum_of(p, p.input + offset[0], begin + member, end);
    }
    shared.sum[threadIdx.x] = sum;
    for (int half = p.share / 2; half > 0; half /= 2) {
      __syncthreads();
      if (member < half) shared.sum[threadIdx.x] += shared.sum[threadIdx.x + half * distance];
    }
    if (member > 0 || output >= p.kept.count) return;
    using A = Accumulator<Output>;
    A total = A(shared.sum[threadIdx.x]);
    if constexpr (kGelu) total = GeluErf::first(total, to_accumulator(p.x[output]), NoOperands<A>());
    p.output[slice * p.kept.count + offset[1]] = from_accumulator<Output>(total);
  }

  __device__ static double sum_of(const Params& p, const Input* input, int64 first, int64 end) {
    constexpr int kLoads = 4;
    double sum = 0;
    for (int64 i = first; i < end; i += kLoads * p.share) {
      Input loaded[kLoads];
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        int64 place[1];
        if (i + load * p.share >= end) continue;
        p.reduced.locate(i + load * p.share, place);
        loaded[load] = input[place[0]];
      }
#pragma unroll
      for (int load = 0; load < kLoads; ++load)
        if (i + load * p.share < end) sum += double(to_accumulator(loaded[load]));
    }
    return sum;
  }
};

// output = gelu(x) + bias over the output's index space; one thread per element.
template <class T>
struct GeluAdd {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 3;

  struct Params {
    T* output;
    const Accumulator<T>* x;
    const T* bias;
    IndexSpace<3> space;  // in the output, in x, in the bias
  };

  __device__ static void run(const Params& p) {
    int64 index = linear_block() * kThreads + threadIdx.x;
    if (index >= p.space.count) return;
    int64 offset[3];
    p.space.locate(index, offset);
    Accumulator<T> gelu = GeluErf::value(p.x[offset[1]], NoOperands<T>());
    p.output[offset[0]] = from_accumulator<T>(gelu + to_accumulator(p.bias[offset[2]]));
  }
};

template <class T>
struct SpreadParams {
  T* output;
  const Accumulator<T>* grad;
  const int* index;
  IndexSpace<3> pixels;  // in the output, in the index, in grad
  int64 channel_stride;
  int channels;
  int share;  // SpreadPlanes: blocks that share a pixel's channels; SpreadNeighbours: lanes, a power of two
  int vector;
  int unused;
};

// A thread takes a pack of neighbouring pixels and writes it into kChannels channels.
template <class T>
struct SpreadPlanes {
  using Params = SpreadParams<T>;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 3;
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kChannels = 32;

  __device__ static void run(const Params& p) {
    if (p.vector)
      run_packs<kWidth>(p);
    else
      run_packs<1>(p);
  }

  template <int kPack>
  __device__ static void run_packs(const Params& p) {
    int64 bundle = quotient(linear_block(), p.share), pixel = (bundle * kThreads + threadIdx.x) * kPack;
    int begin = int(linear_block() - bundle * p.share) * kChannels;
    if (pixel >= p.pixels.count) return;
    int64 offset[3];
    p.pixels.locate(pixel, offset);
    T grad[kPack];
    int chosen[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      chosen[i] = p.index[offset[1] + i * p.pixels.step(1)];
      grad[i] = from_accumulator<T>(p.grad[offset[2] + i * p.pixels.step(2)]);
    }
    int end = minimum_of(begin + kChannels, p.channels);
    T* output = p.output + offset[0] + begin * p.channel_stride;
#pragma unroll 4
    for (int channel = begin; channel < end; ++channel) {
      Packed<T, kPack> pack;
#pragma unroll
      for (int i = 0; i < kPack; ++i) pack.value[i] = channel == chosen[i] ? grad[i] : T{};
      *reinterpret_cast<Packed<T, kPack>*>(output) = pack;
      output += p.channel_stride;
    }
  }
};

// A team of `share` neighbouring lanes takes a pixel, each lane every `share`th pack of its channels.
template <class T>
struct SpreadNeighbours {
  using Params = SpreadParams<T>;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 3;
  static constexpr int kWidth = 16 / sizeof(T);

  __device__ static void run(const Params& p) {
    int64 pixel = linear_block() * (kThreads / p.share) + threadIdx.x / p.share;
    if (pixel >= p.pixels.count) return;
    int64 offset[3];
    p.pixels.locate(pixel, offset);
    int lane = threadIdx.x & (p.share - 1), chosen = p.index[offset[1]];
    T grad = from_accumulator<T>(p.grad[offset[2]]);
    if (p.vector)
      write<kWidth>(p, p.output + offset[0], lane, chosen, grad);
    else
      write<1>(p, p.output + offset[0], lane, chosen, grad);
  }

  template <int kPack>
  __device__ static void write(const Params& p, T* output, int lane, int chosen, T grad) {
    for (int channel = lane * kPack; channel < p.channels; channel += p.share * kPack) {
      Packed<T, kPack> pack;
#pragma unroll
      for (int i = 0; i < kPack; ++i) pack.value[i] = channel + i == chosen ? grad : T{};
      *reinterpret_cast<Packed<T, kPack>*>(output + channel * p.channel_stride) = pack;
    }
  }
};

}  // namespace rawkern
