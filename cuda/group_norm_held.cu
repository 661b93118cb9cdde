// Group normalisation, forward and backward, of groups small enough for the registers of the threads that share them:
// up to kHeldThreads * kHeldValues elements. What is computed is that of group_norm.cu, where the larger ones are.
//
// Walking along rows, as there, takes three launches forward and four backward, reads the data twice, and for rows of
// few elements (one, where there are no spatial axes) spends more on each row than on its elements. Here a team of
// neighbouring threads, from one thread to a block, holds a whole group: the data is read once and written once, and a
// thread's elements are every team-th vector of the group, so that neighbours read neighbours whatever the shape of a
// channel. Vectors have 16 bytes where the launcher finds everything aligned, else one element. Sums of a team go
// through shuffles, and through shared memory where it has several warps.
//
// Forward is one launch. Backward is one launch for small batches and otherwise two: a block takes the same groups of
// several images, each thread the same places of the group in all of them, and keeps sums over the images for each
// place, of what the weight's and bias's gradients are made of, in shared memory. At the end it adds them up by
// channel, in a fixed order, and if there are more blocks for these channels leaves two sums per channel to
// ChannelGradients (group_norm.cu).
//
// Written for any GPU from sm_80 on.
#include "centered.cuh"
#include "chain.cuh"
#include "opaque.cuh"
#include "quotient.cuh"
#include "reductions.cuh"
#include "value_vector.cuh"

namespace rawkern {

constexpr int kHeldThreads = 512;
constexpr int kHeldValues = 8;  // of one thread
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kSharedOfTwoBlocks = 98 << 10;  // on one multiprocessor
#else
constexpr int kSharedOfTwoBlocks = 162 << 10;
#endif

struct HeldGroups {
  int64 images;
  double inverse_size;  // 1 / size
  int groups;           // per image
  int channels_per_group;
  int size;             // elements of a group
  int divisor;          // elements of a channel; channels-last: of a pixel
  unsigned reciprocal;  // 2^31 / divisor, rounded up
  unsigned jump;        // channels-last: elements between the group's channels of two pixels
  int loads;            // vectors of a thread
  int stride;           // elements from one to the next
  int team_bits;        // 2^team_bits threads hold a group
  int across_bits;      // backward: a block takes 2^across_bits neighbouring groups of an image
  int rounds;           // backward: images that a team takes, one after the other
  int channels_last;

  __device__ int team() const { return 1 << team_bits; }
  __device__ int across() const { return 1 << across_bits; }
  __device__ int teams() const { return kHeldThreads >> team_bits; }
  // element / divisor: exact, because both are less than 2^15.
  __device__ unsigned quotient_of(unsigned element) const { return unsigned((uint64(2 * element) * reciprocal) >> 32); }
};

// What one thread holds of a group: `loads` vectors, some threads one less. In contiguous memory a group is one piece,
// channel after channel; in channels-last memory, pixel after pixel, its channels lie together, and elements are
// numbered in that order. A vector that a thread has not it reads from the group's end, so that no load waits for a
// branch of its own.
template <int kWidth>
struct Part {
  static constexpr int kLoads = kHeldValues / kWidth;
  const HeldGroups& q;
  int first;

  // What is computed from two parts is computed twice: places that are kept cost more registers than instructions.
  __device__ explicit Part(const HeldGroups& q) : q(q), first(opaque(int(threadIdx.x & (q.team() - 1))) * kWidth) {}

  __device__ int place(int load) const { return first + load * q.stride; }
  __device__ bool has(int load) const { return place(load) < q.size; }
  __device__ int element(int load) const { return minimum_of(place(load), q.size - kWidth); }
  // Of an element. Without signs, which would cost more than the product.
  __device__ uint64 offset(unsigned element) const { return uint64(q.quotient_of(element)) * q.jump + element; }
  __device__ unsigned channel(unsigned element) const {  // of the group's
    unsigned quotient = q.quotient_of(element);
    return q.channels_last ? element - quotient * q.divisor : quotient;
  }
  __device__ int64 origin(int64 image, int group) const {
    return image * (int64(q.groups) * q.size) + int64(group) * (q.channels_last ? q.channels_per_group : q.size);
  }
};

template <class T, int kWidth>
__device__ inline void read_part(ValueVector<T, kWidth> (&vector)[Part<kWidth>::kLoads], const Part<kWidth>& part,
                                 const T* group) {
  using Vector = ValueVector<T, kWidth>;
#pragma unroll
  for (int load = 0; load < Part<kWidth>::kLoads; ++load) {
    vector[load] = Vector{};  // else what there was in an earlier round would have to be kept
    if (load < part.q.loads) vector[load] = *reinterpret_cast<const Vector*>(group + part.offset(part.element(load)));
  }
}

// What a vector of the group's channels (null: `otherwise` everywhere) has for each element.
template <class T, int kWidth>
__device__ inline void read_channels(T (&values)[Part<kWidth>::kLoads][kWidth], const Part<kWidth>& part,
                                     const void* vector, int first_channel, float otherwise) {
  const T* group = static_cast<const T*>(vector) + first_channel;
#pragma unroll
  for (int load = 0; load < Part<kWidth>::kLoads; ++load) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[load][i] = from_accumulator<T>(otherwise);
      if (vector && load < part.q.loads) values[load][i] = group[part.channel(part.element(load) + i)];
    }
  }
}

template <class T, int kWidth>
__device__ inline void write_vector(T* destination, const Accumulator<T> (&values)[kWidth]) {
  ValueVector<T, kWidth> vector;
  vector.set(values);
  *reinterpret_cast<ValueVector<T, kWidth>*>(destination) = vector;
}

// mean[group], rstd[group] and output = (h - mean) * rstd * weight + bias, h = Pre(input). Two passes over the
// registers: the mean of the distances from the group's first value, then the squared deviations from the mean.
template <class T, class Pre, int kWidth>
struct NormalizeHeld {
  static constexpr int kThreads = kHeldThreads, kMinBlocks = sizeof(T) == 8 ? 1 : 2, kLoads = Part<kWidth>::kLoads;
  using A = Accumulator<T>;
  using W = Wide<T>;
  using Sum = TeamSum<kThreads, 1>;
  struct Params {
    const void* input;
    void* output;
    double* mean;
    double* rstd;
    const void* weight;
    const void* bias;
    HeldGroups groups;
    double eps;
    typename Pre::Params chain;
  };

  using Channels = T[kLoads][kWidth];

  __device__ static void store(T* output, const Part<kWidth>& part, double mean, double rstd,
                               const A (&h)[kLoads][kWidth], const Channels& weight, const Channels& bias) {
    Center<A> center(mean);
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      if (!part.has(load)) continue;
      A result[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        result[i] = center(h[load][i]) * (A(rstd) * to_accumulator(weight[load][i])) + to_accumulator(bias[load][i]);
      write_vector<T, kWidth>(output + part.offset(part.place(load)), result);
    }
  }

  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(typename Sum::Storage, shared);
    const HeldGroups& q = p.groups;
    int64 group = linear_block() * q.teams() + (threadIdx.x >> q.team_bits);
    bool exists = group < q.images * q.groups;
    if (!exists) group = 0;
    int64 image = quotient(group, q.groups);
    int group_in_image = int(group - image * q.groups);

    Part<kWidth> part(q);
    int64 origin = part.origin(image, group_in_image);
    const T* input = static_cast<const T*>(p.input) + origin;
    ValueVector<T, kWidth> vector[kLoads];
    read_part<T, kWidth>(vector, part, input);
    Channels weight, bias;
    read_channels<T, kWidth>(weight, part, p.weight, group_in_image * q.channels_per_group, 1);
    read_channels<T, kWidth>(bias, part, p.bias, group_in_image * q.channels_per_group, 0);

    typename Pre::template Operands<T> operands{p.chain, 0};
    A h[kLoads][kWidth], pivot = Pre::template value<T>(to_accumulator(input[0]), operands);
    W total = 0, m2 = 0;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      if (load >= q.loads) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        h[load][i] = Pre::template value<T>(vector[load].get(i), operands);
        W distance = W(h[load][i]) - W(pivot);
        total += part.has(load) ? distance : W(0);
      }
    }
    total = Sum::run(shared, Sums<1>{{double(total)}}, q.team()).value[0] * q.inverse_size;
    double mean = double(pivot) + double(total);

    Center<W> center(mean);
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      if (load >= q.loads) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        W d = center(W(h[load][i]));
        m2 += part.has(load) ? d * d : W(0);
      }
    }
    double variance = Sum::run(shared, Sums<1>{{double(m2)}}, q.team()).value[0] * q.inverse_size;
    double rstd = 1.0 / sqrt(variance + p.eps);
    if (!exists) return;
    if (part.first == 0) {
      p.mean[group] = mean;
      p.rstd[group] = rstd;
    }
    store(static_cast<T*>(p.output) + origin, Part<kWidth>(q), mean, rstd, h, weight, bias);
  }
};

// What the threads of a block have of g and g xh, one sum over images per element, and its sums by channel.
template <class W>
struct ChannelShares {
  W value[2][kHeldThreads * kHeldValues];  // team after team

  // Where the elements of a channel of the block lie among those of one image: start, start + step, ...
  __device__ static void locate(const HeldGroups& q, int channel, int& start, int& step) {
    int per_group = q.channels_per_group, group = unsigned(channel) / unsigned(per_group);
    start = q.channels_last ? group * q.size + channel - group * per_group : channel * q.divisor;
    step = q.channels_last ? per_group : 1;
  }

  // Every members-th of a channel's elements.
  __device__ double share(const HeldGroups& q, int which, int channel, int member, int members) const {
    int per_group = q.channels_per_group, spatial = q.channels_last ? q.size / per_group : q.divisor;
    int images = q.teams() >> q.across_bits, start, step;
    locate(q, channel, start, step);
    double sum = 0;
    for (int i = member; i < images * spatial; i += members) {
      int image = unsigned(i) / unsigned(spatial);
      sum += double(value[which][(image << q.across_bits) * q.size + start + (i - image * spatial) * step]);
    }
    return sum;
  }

  // Calls store(channel of the block, sum) for each channel. Neighbouring threads take neighbouring channels; where
  // there are more threads than channels, several share one. `partial` has room for a number of each thread.
  template <class Store>
  __device__ void total(const HeldGroups& q, int which, double* partial, Store&& store) {
    int channels = q.channels_per_group << q.across_bits, width = 1, bits = 0;
    for (; width < channels && width < kHeldThreads; width *= 2) ++bits;
    int members = kHeldThreads >> bits, member = threadIdx.x >> bits;
    for (int first = 0; first < channels; first += width) {
      int channel = first + (threadIdx.x & (width - 1));
      partial[threadIdx.x] = channel < channels ? share(q, which, channel, member, members) : 0;
      for (int half = members / 2; half > 0; half /= 2) {
        __syncthreads();
        if (member < half) partial[threadIdx.x] += partial[threadIdx.x + half * width];
      }
      if (member == 0 && channel < channels) store(channel, partial[threadIdx.x]);
      __syncthreads();
    }
  }
};

// grad_input, and what belongs to the block of grad_weight and grad_bias; each may be null. The formulas are those of
// GradInput and RowSums (group_norm.cu). What the weight's and bias's gradients are made of is summed over a thread's
// images in W; everything between threads is summed in double.
template <class T, class Pre, int kWidth>
struct GradientsHeld {
  static constexpr int kThreads = kHeldThreads, kLoads = Part<kWidth>::kLoads;
  using A = Accumulator<T>;
  using W = Wide<T>;
  using Sum = TeamSum<kThreads, 2>;
  using Operands = typename Pre::template Operands<T>;
  struct Params {
    const void* grad_output;
    const void* input;
    void* grad_input;
    const double* mean;
    const double* rstd;
    const void* weight;
    Sums<2>* sums;  // [slot][channel] of g and g xh, or null: then there is one slot, and the gradients are stored
    void* grad_weight;
    void* grad_bias;
    HeldGroups groups;
    int64 slots;
    typename Pre::Params chain;

    __device__ bool for_channels() const { return sums || grad_weight || grad_bias; }
  };
  struct Shared {
    ChannelShares<W> channels;
    union {
      T weight[kThreads * kHeldValues];  // of the block's channels
      double partial[kThreads];
    } scratch;
    typename Sum::Storage team;
    int64 slot;  // of the block
    int first_group;
  };
  // Two, where shared memory has room for them.
  static constexpr int kMinBlocks = sizeof(T) < 8 && 2 * sizeof(Shared) <= kSharedOfTwoBlocks ? 2 : 1;

  // Adds to what the block has of g and g xh; in the first round there is nothing yet.
  __device__ static void share(W* kept, const W (&values)[kWidth], bool is_first) {
    constexpr int kCount = kWidth * sizeof(W) < 16 ? kWidth : 16 / sizeof(W);
    using Kept = Packed<W, kCount>;
#pragma unroll
    for (int begin = 0; begin < kWidth; begin += kCount) {
      Kept sum = is_first ? Kept{} : *reinterpret_cast<Kept*>(kept + begin);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum.value[i] += values[begin + i];
      *reinterpret_cast<Kept*>(kept + begin) = sum;
    }
  }

  // Which group of which image a thread's team takes in a round; not every team has one in each.
  struct Job {
    int64 image;
    int group;
    bool exists;

    __device__ Job(const HeldGroups& q, const Shared& shared, int round) {
      int team = threadIdx.x >> q.team_bits, images = q.teams() >> q.across_bits;
      group = shared.first_group + (team & (q.across() - 1));
      image = (shared.slot * q.rounds + round) * images + (team >> q.across_bits);
      exists = group < q.groups && image < q.images;
      if (!exists) image = group = 0;
    }
  };

  // A round of the block. Threads of teams without a group come along to the barriers.
  __device__ static void run_round(const Params& p, Shared& shared, int round) {
    const HeldGroups& q = p.groups;
    Job job(q, shared, round);
    bool exists = job.exists;
    Part<kWidth> part(q);
    Operands operands(p.chain, 0);
    int64 origin = part.origin(job.image, job.group);
    ValueVector<T, kWidth> g[kLoads], x[kLoads];
    read_part<T, kWidth>(g, part, static_cast<const T*>(p.grad_output) + origin);
    read_part<T, kWidth>(x, Part<kWidth>(q), static_cast<const T*>(p.input) + origin);
    const T* weights = shared.scratch.weight + (exists ? job.group - shared.first_group : 0) * q.channels_per_group;
    auto weighted = [&](const Part<kWidth>& part, int element, W value) {
      return W(to_accumulator(weights[part.channel(element)])) * value;
    };
    W rstd = W(p.rstd[job.image * q.groups + job.group]);
    Center<W> center(p.mean[job.image * q.groups + job.group]);
    auto deviation = [&](const Center<W>& center, A x) { return center(W(Pre::template value<T>(x, operands))); };
    int kept = (threadIdx.x >> q.team_bits) * q.size;

    Part<kWidth> sums_part(q);
    W sum_a = 0, sum_ad = 0;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      if (load >= q.loads) continue;
      // One quantity after the other, to hold as little as may be at once.
      bool has = sums_part.has(load), keeps = has && p.for_channels();
      W terms[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        W value = W(g[load].get(i));
        sum_a += has ? weighted(sums_part, sums_part.element(load) + i, value) : W(0);
        terms[i] = exists ? value : W(0);
      }
      if (keeps) share(shared.channels.value[0] + kept + sums_part.place(load), terms, round == 0);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        W product = W(g[load].get(i)) * deviation(center, x[load].get(i));
        sum_ad += has ? weighted(sums_part, sums_part.element(load) + i, product) : W(0);
        terms[i] = exists ? product * rstd : W(0);
      }
      if (keeps) share(shared.channels.value[1] + kept + sums_part.place(load), terms, round == 0);
    }
    if (!p.grad_input) return;
    Sums<2> sums = Sum::run(shared.team, Sums<2>{{double(sum_a), double(sum_ad)}}, q.team());
    if (!exists) return;

    // Where and what the group is, once more, rather than to hold it all the while.
    Part<kWidth> again(q);
    Job same(q, shared, round);
    Center<W> center_again(p.mean[same.image * q.groups + same.group]);
    double r = p.rstd[same.image * q.groups + same.group];
    double factor = q.size == 1 ? 0 * r : r;  // groups of one value are constant whatever the value
    W mean_a = W(sums.value[0] * q.inverse_size), slope = W(-factor * r * (sums.value[1] * q.inverse_size));
    W scale = W(factor);
    T* grad_input = static_cast<T*>(p.grad_input) + again.origin(same.image, same.group);
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      if (!again.has(load)) continue;
      A result[kWidth], unused[Pre::kTensorSlots];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        W a = weighted(again, again.place(load) + i, W(g[load].get(i))), d = deviation(center_again, x[load].get(i));
        A gradient = A(scale * ((a - mean_a) + slope * d));
        result[i] = Pre::template backward<T>(gradient, x[load].get(i), operands, unused);
      }
      write_vector<T, kWidth>(grad_input + again.offset(again.place(load)), result);
    }
  }

  // The sum that a block has for a channel: one of several, or the gradient itself.
  __device__ static void keep(const Params& p, int64 slot, int channel, int which, double sum) {
    int channels = p.groups.groups * p.groups.channels_per_group;
    if (channel >= channels) return;
    T* gradient = static_cast<T*>(which == 0 ? p.grad_bias : p.grad_weight);
    if (p.sums)
      p.sums[slot * channels + channel].value[which] = sum;
    else if (gradient)
      gradient[channel] = from_accumulator<T>(sum);
  }

  __device__ static void run(const Params& p) {
    RAWKERN_DYNAMIC_SHARED(Shared, shared);
    const HeldGroups& q = p.groups;
    int columns = (q.groups + q.across() - 1) >> q.across_bits;
    int64 slot = quotient(linear_block(), columns);
    if (slot >= p.slots) return;
    if (threadIdx.x == 0) {  // kept in shared memory: registers are scarce
      shared.slot = slot;
      shared.first_group = int(linear_block() - slot * columns) << q.across_bits;
    }
    __syncthreads();
    int first_channel = shared.first_group * q.channels_per_group, channels = q.groups * q.channels_per_group;
#pragma unroll 1
    for (int i = threadIdx.x; i < q.channels_per_group << q.across_bits; i += kThreads)
      shared.scratch.weight[i] = p.weight && first_channel + i < channels
                                     ? static_cast<const T*>(p.weight)[first_channel + i]
                                     : from_accumulator<T>(A(1));
    __syncthreads();
#pragma unroll 1
    for (int round = 0; round < q.rounds; ++round) run_round(p, shared, round);
    if (!p.for_channels()) return;
    __syncthreads();
    for (int which = 0; which < 2; ++which)
      shared.channels.total(q, which, shared.scratch.partial, [&](int channel, double sum) {
        keep(p, shared.slot, shared.first_group * q.channels_per_group + channel, which, sum);
      });
  }
};

}  // namespace rawkern
