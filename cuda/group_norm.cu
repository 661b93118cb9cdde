// Group normalisation of a tensor (N, C, *), forward, backward and twice backward, with an optional pointwise function
// `Pre` (a chain without operands: identity or GELU) that is applied to the input before it is normalised.
//
//   y = (h - mean) * rstd * weight[c] + bias[c],   h = Pre(x),   mean and variance of h over the channels of a group
//
// Groups of up to 4096 elements are left to group_norm_held.cu, which reads them once; those twice backward are not.
//
// Every pass over the data is a walk along rows (team_walk.cuh): memory-bound, one read of each input, one write of
// each output, no shared memory, nothing between threads but the final sum of a team of lanes. The passes are
//   forward    RowMoments -> GroupStatistics -> Normalize
//   backward   RowSums<2> -> GroupMeans<2>, ChannelGradients -> GradInput (-> ChannelGradients)
//   twice      RowSums<5> -> GroupMeans<7>, SecondChannelGradients -> SecondGradients
// Sums leave a thread's registers as double; small kernels (one team of threads per group, or per channel) combine them
// in a fixed order. Mean and rstd stay double, and the mean is subtracted as two floats (Center), so data whose mean is
// a million times its deviation keeps all the digits it came with. Gradients are small differences of large terms (of a
// group of two values nearly nothing is left), so for float data statistics and backward passes compute in double
// (Wide): four to six such operations per element, which memory traffic still hides.
//
// Written for any GPU from sm_80 on; nothing here depends on its size.
#include "centered.cuh"
#include "chain.cuh"
#include "moments.cuh"
#include "reductions.cuh"
#include "team_walk.cuh"

namespace rawkern {

// Which group a row belongs to.
struct Groups {
  int64 groups;  // per image
  int64 channels_per_group;

  __device__ int64 of(const Stretch& s) const { return s.image * groups + quotient(s.channel, channels_per_group); }

  // The factor of gradients: 1 / deviation, and 0 for groups of one value, which are constant whatever the value.
  __device__ double factor(const Rows& rows, double rstd) const {
    return channels_per_group * rows.spatial == 1 ? 0 * rstd : rstd;
  }
};

// moments[row][slot] of Pre(input). In contiguous memory the launcher may pass whole groups as rows.
//
// Each thread takes mean and squared deviations of its batch in registers, in two passes around the batch's first
// value; batches meet in double around the first value of the slot, which is never further from the slot's mean than
// sqrt(slot_length) deviations, so that the difference of squares at the end loses at most 12 of 53 bits.
template <class T, class Pre>
struct RowMoments {
  static constexpr int kThreads = 256, kMinBlocks = sizeof(T) == 8 ? 1 : 2;
  using A = Wide<T>;
  struct Params {
    const void* input;
    Moments* moments;
    Rows rows;
    typename Pre::Params chain;
  };

  struct Body {
    typename Pre::template Operands<T> operands;
    double pivot, sum, squares, within;
    int64 count;

    template <class B>
    __device__ void operator()(const B& batch) {
      A value[B::kLoads][B::kWidth], total = 0, m2 = 0;
      A first = A(Pre::template value<T>(batch.get(0, 0, 0), operands));
#pragma unroll
      for (int load = 0; load < B::kLoads; ++load) {
        if (load >= batch.valid) continue;
#pragma unroll
        for (int i = 0; i < B::kWidth; ++i) {
          value[load][i] = A(Pre::template value<T>(batch.get(0, load, i), operands)) - first;
          total += value[load][i];
        }
      }
      int values = batch.valid * B::kWidth;
      A mean = total / A(values);
#pragma unroll
      for (int load = 0; load < B::kLoads; ++load) {
        if (load >= batch.valid) continue;
#pragma unroll
        for (int i = 0; i < B::kWidth; ++i) m2 += (value[load][i] - mean) * (value[load][i] - mean);
      }
      double distance = double(first) - pivot + double(mean);
      count += values;
      sum += values * distance;
      squares += values * distance * distance;
      within += double(m2);
    }
  };

  __device__ static void run(const Params& p) {
    Stretch s = Stretch::of_thread<kThreads>(p.rows);
    const T* const input[1] = {static_cast<const T*>(p.input)};
    Body body{{p.chain, 0}, 0, 0, 0, 0, 0};
    if (s.begin < s.end)
      body.pivot = double(Pre::template value<T>(to_accumulator(input[0][s.origin + s.begin * s.step]), body.operands));
    walk<64>(p.rows, s, input, body);
    double count = s.team_sum(p.rows, double(body.count)), sum = s.team_sum(p.rows, body.sum);
    double squares = s.team_sum(p.rows, body.squares), within = s.team_sum(p.rows, body.within);
    if (!s.exists || s.place != 0) return;
    double m2 = within + (squares - sum * sum / count);
    if (m2 < 0) m2 = 0;
    p.moments[s.row * p.rows.slots + s.slot] =
        count > 0 ? Moments{count, body.pivot + sum / count, m2} : Moments{0, 0, 0};
  }
};

// mean[group] and rstd[group] of consecutive runs of `entries` moments; a team of threads per group, thread by thread
// every team-th entry, then a tree. Small and latency-bound; the moments are read once.
struct GroupStatistics {
  static constexpr int kThreads = 256, kMinBlocks = 2;
  struct Params {
    const Moments* moments;
    double* mean;
    double* rstd;
    int64 count;    // of groups, over all images
    int64 entries;  // moments per group
    double eps;
    int64 team;
  };

  __device__ static void run(const Params& p) {
    using Combine = TeamCombine<kThreads, Moments>;
    RAWKERN_SHARED(typename Combine::Storage, shared);
    int team = int(p.team), place = threadIdx.x % team;
    int64 group = linear_block() * (kThreads / team) + threadIdx.x / team;
    Moments all{0, 0, 0};
    if (group < p.count)
      for (int64 i = place; i < p.entries; i += team) all = combine(all, p.moments[group * p.entries + i]);
    all = Combine::run(shared, all, team);
    if (group >= p.count || place != 0) return;
    p.mean[group] = all.mean;
    p.rstd[group] = 1.0 / sqrt(all.m2 / all.count + p.eps);
  }
};

// output = (Pre(input) - mean) * rstd * weight + bias.
template <class T, class Pre>
struct Normalize {
  static constexpr int kThreads = 256, kMinBlocks = 2;
  using A = Accumulator<T>;
  struct Params {
    const void* input;
    void* output;
    const double* mean;
    const double* rstd;
    const void* weight;
    const void* bias;
    Rows rows;
    Groups groups;
    typename Pre::Params chain;
  };

  struct Body {
    typename Pre::template Operands<T> operands;
    Center<A> center;
    A scale, shift;
    T* output;

    template <class B>
    __device__ void operator()(const B& batch) {
#pragma unroll
      for (int load = 0; load < B::kLoads; ++load) {
        if (load >= batch.valid) continue;
        Packed<T, B::kWidth> result;
#pragma unroll
        for (int i = 0; i < B::kWidth; ++i) {
          A x = center(Pre::template value<T>(batch.get(0, load, i), operands));
          result.value[i] = from_accumulator<T>(x * scale + shift);
        }
        batch.store(output, load, result);
      }
    }
  };

  __device__ static void run(const Params& p) {
    Stretch s = Stretch::of_thread<kThreads>(p.rows);
    if (!s.exists) return;
    int64 group = p.groups.of(s);
    A scale = A(p.rstd[group] * value_or<T>(p.weight, s.channel, 1)), shift = A(value_or<T>(p.bias, s.channel, 0));
    const T* const input[1] = {static_cast<const T*>(p.input)};
    walk<64>(p.rows, s, input,
             Body{{p.chain, s.channel}, Center<A>(p.mean[group]), scale, shift, static_cast<T*>(p.output)});
  }
};

// sums[row][slot] = (sum of g, sum of g xh) for the gradient g of the output; xh = (Pre(input) - mean) * rstd.
template <class T, class Pre>
struct RowSums {
  static constexpr int kThreads = 256, kMinBlocks = 2;
  using A = Wide<T>;
  struct Params {
    const void* grad_output;
    const void* input;
    const double* mean;
    const double* rstd;
    Sums<2>* sums;
    Rows rows;
    Groups groups;
    typename Pre::Params chain;
  };

  struct Body {
    typename Pre::template Operands<T> operands;
    Center<A> center;
    Sums<2>& sums;

    template <class B>
    __device__ void operator()(const B& batch) {
      A sum_g = 0, sum_gx = 0;
#pragma unroll
      for (int load = 0; load < B::kLoads; ++load) {
        if (load >= batch.valid) continue;
#pragma unroll
        for (int i = 0; i < B::kWidth; ++i) {
          A g = A(batch.get(0, load, i));
          sum_g += g;
          sum_gx += g * center(A(Pre::template value<T>(batch.get(1, load, i), operands)));
        }
      }
      sums.value[0] += double(sum_g);
      sums.value[1] += double(sum_gx);
    }
  };

  __device__ static void run(const Params& p) {
    Stretch s = Stretch::of_thread<kThreads>(p.rows);
    const T* const input[2] = {static_cast<const T*>(p.grad_output), static_cast<const T*>(p.input)};
    int64 group = s.exists ? p.groups.of(s) : 0;
    Sums<2> sums = Sums<2>::none();
    walk<64>(p.rows, s, input, Body{{p.chain, s.exists ? s.channel : 0}, Center<A>(p.mean[group]), sums});
    for (int i = 0; i < 2; ++i) sums.value[i] = s.team_sum(p.rows, sums.value[i]);
    sums.value[1] *= p.rstd[group];
    if (s.exists && s.place == 0) p.sums[s.row * p.rows.slots + s.slot] = sums;
  }
};

// What GroupMeans takes from the sums of one slot of channel c: a = weight * g.
struct FirstTerms {
  static constexpr int kSums = 2, kTerms = 2;
  __device__ static Sums<2> of(const Sums<2>& s, double weight, double) {
    return Sums<2>{{weight * s.value[0], weight * s.value[1]}};  // a, a xh
  }
};
// The sums are those of g, g xh, v, v xh, v g (SecondRowSums); u is the cotangent of the weight's gradient.
struct SecondTerms {
  static constexpr int kSums = 5, kTerms = 7;
  __device__ static Sums<7> of(const Sums<5>& s, double weight, double u) {
    return Sums<7>{{weight * s.value[0], weight * s.value[1], s.value[2], s.value[3], weight * s.value[4],
                    u * s.value[0], u * s.value[1]}};  // a, a xh, v, v xh, v a, u g, u g xh
  }
};

// means[group] = the terms summed over the group's rows, divided by the number of elements. A team of threads per
// group, as in GroupStatistics.
template <class T, class Terms>
struct GroupMeans {
  static constexpr int kThreads = 256, kMinBlocks = 2;
  struct Params {
    const Sums<Terms::kSums>* sums;
    const void* weight;
    const void* second_weight;
    Sums<Terms::kTerms>* means;
    Groups groups;
    int64 count;      // of groups, over all images
    int64 slots;      // per row
    double elements;  // per group
    int64 team;
  };

  __device__ static void run(const Params& p) {
    using Combine = TeamCombine<kThreads, Sums<Terms::kTerms>>;
    RAWKERN_SHARED(typename Combine::Storage, shared);
    int team = int(p.team), place = threadIdx.x % team;
    int64 group = linear_block() * (kThreads / team) + threadIdx.x / team;
    int64 entries = p.groups.channels_per_group * p.slots;
    auto all = Sums<Terms::kTerms>::none();
    if (group < p.count) {
      int64 first_channel = group % p.groups.groups * p.groups.channels_per_group;
      for (int64 i = place; i < entries; i += team) {
        int64 channel = first_channel + quotient(i, p.slots);
        all = combine(all, Terms::of(p.sums[group * entries + i], value_or<T>(p.weight, channel, 1),
                                     value_or<T>(p.second_weight, channel, 0)));
      }
    }
    all = Combine::run(shared, all, team);
    if (group >= p.count || place != 0) return;
#pragma unroll
    for (int i = 0; i < Terms::kTerms; ++i) p.means[group].value[i] = all.value[i] / p.elements;
  }
};

// A sum over images and slots for every channel. A block takes `width` neighbouring channels (a power of two up to a
// warp), 256 / width threads each: wide where rows are many and short, so that reads are coalesced, narrow where they
// are few. Terms::of(params, image, channel, sums of a slot) gives what is added.
template <int kThreads, class Terms>
struct ChannelTotal {
  struct Storage {
    typename Terms::Result partial[kThreads];
  };

  template <class Params>
  __device__ static void run(Storage& shared, const Params& p) {
    int width = int(p.width), members = kThreads / width, member = threadIdx.x / width;
    int64 channel = linear_block() * width + threadIdx.x % width;
    auto all = Terms::Result::none();
    if (channel < p.channels) {
      for (int64 i = member; i < p.images * p.slots; i += members) {
        int64 image = quotient(i, p.slots), slot = i - image * p.slots;
        all = combine(all, Terms::of(p, image, channel, p.sums[(image * p.channels + channel) * p.slots + slot]));
      }
    }
    shared.partial[threadIdx.x] = all;
    for (int half = members / 2; half > 0; half /= 2) {
      __syncthreads();
      if (member < half)
        shared.partial[threadIdx.x] = combine(shared.partial[threadIdx.x], shared.partial[threadIdx.x + half * width]);
    }
    if (member == 0 && channel < p.channels) Terms::store(p, channel, shared.partial[threadIdx.x]);
  }
};

// grad_bias[c] = sum of g, grad_weight[c] = sum of g xh over all images; either may be null.
template <class T>
struct ChannelGradients {
  static constexpr int kThreads = 256, kMinBlocks = 2;
  struct Params {
    const Sums<2>* sums;
    void* grad_weight;
    void* grad_bias;
    int64 images;
    int64 channels;
    int64 slots;
    int64 width;
    double weight_factor;  // 1; NaN where xh is undefined, because groups are empty
  };
  struct Terms {
    using Result = Sums<2>;
    __device__ static Sums<2> of(const Params&, int64, int64, const Sums<2>& sums) { return sums; }
    __device__ static void store(const Params& p, int64 channel, const Sums<2>& sums) {
      if (p.grad_weight) static_cast<T*>(p.grad_weight)[channel] = from_accumulator<T>(sums.value[1] * p.weight_factor);
      if (p.grad_bias) static_cast<T*>(p.grad_bias)[channel] = from_accumulator<T>(sums.value[0]);
    }
  };
  __device__ static void run(const Params& p) {
    using Total = ChannelTotal<kThreads, Terms>;
    RAWKERN_SHARED(typename Total::Storage, shared);
    Total::run(shared, p);
  }
};

// grad_input = rstd * (a - D(a) - xh D(a xh)) * Pre'(input), with a = weight * g and D the mean over the group
// (`means`); in the deviation d = Pre(input) - mean that is rstd * ((weight * g - D(a)) + slope * d), times Pre'. In
// this order the products of 16-bit values and their difference from D(a) are exact in float. Unless `sums` is null,
// sums[row][slot] = (sum of grad_input, 0), from which ChannelGradients makes the gradient of a bias added to the
// input.
template <class T, class Pre>
struct GradInput {
  static constexpr int kThreads = 256, kMinBlocks = sizeof(T) == 8 ? 1 : 2;
  using A = Wide<T>;
  struct Params {
    const void* grad_output;
    const void* input;
    void* grad_input;
    const double* mean;
    const double* rstd;
    const void* weight;
    const Sums<2>* means;
    Sums<2>* sums;
    Rows rows;
    Groups groups;
    typename Pre::Params chain;
  };

  struct Body {
    typename Pre::template Operands<T> operands;
    Center<A> center;
    A rstd, weight, mean_a, slope;
    T* grad_input;
    double& total;

    template <class B>
    __device__ void operator()(const B& batch) {
      Accumulator<T> sum = 0;
#pragma unroll
      for (int load = 0; load < B::kLoads; ++load) {
        if (load >= batch.valid) continue;
        Packed<T, B::kWidth> result;
#pragma unroll
        for (int i = 0; i < B::kWidth; ++i) {
          Accumulator<T> x = batch.get(1, load, i), unused[Pre::kTensorSlots];
          A d = center(A(Pre::template value<T>(x, operands)));
          A gradient = rstd * ((weight * A(batch.get(0, load, i)) - mean_a) + slope * d);
          result.value[i] =
              from_accumulator<T>(Pre::template backward<T>(Accumulator<T>(gradient), x, operands, unused));
          sum += to_accumulator(result.value[i]);
        }
        batch.store(grad_input, load, result);
      }
      total += double(sum);
    }
  };

  __device__ static void run(const Params& p) {
    Stretch s = Stretch::of_thread<kThreads>(p.rows);
    const T* const input[2] = {static_cast<const T*>(p.grad_output), static_cast<const T*>(p.input)};
    int64 group = s.exists ? p.groups.of(s) : 0;
    double r = p.groups.factor(p.rows, p.rstd[group]), total = 0;
    Sums<2> means = p.means[group];
    walk<64>(p.rows, s, input,
             Body{{p.chain, s.channel},
                  Center<A>(p.mean[group]),
                  A(r),
                  A(value_or<T>(p.weight, s.channel, 1)),
                  A(means.value[0]),
                  A(-r * means.value[1]),
                  static_cast<T*>(p.grad_input),
                  total});
    if (!p.sums) return;
    total = s.team_sum(p.rows, total);
    if (s.exists && s.place == 0) p.sums[s.row * p.rows.slots + s.slot] = Sums<2>{{total, 0}};
  }
};

// The backward pass differentiated once more (identity Pre). With v the cotangent of grad_input, u and t those of the
// weight's and bias's gradients, r = rstd, a = w g, D the mean over the group:
//     grad_g = w pv + u xh + t,  pv = r (v - D(v) - xh D(v xh))
//     grad_x = r (c - D(c) - xh D(c xh)) - r^2 S xh,  c = u g - r (D(a xh) v + D(v xh) a),
//              S = D(v a) - D(v) D(a) - D(v xh) D(a xh)
//     grad_w = sum over images of r (sum v g - D(v) sum g - D(v xh) sum g xh)
// so one pass collects five sums per row, and one pass writes both gradients. v, u and t may each be absent (null).

// sums[row][slot] = sums of g, g xh, v, v xh, v g.
template <class T>
struct SecondRowSums {
  static constexpr int kThreads = 256, kMinBlocks = 2;
  using A = Wide<T>;
  struct Params {
    const void* grad_output;
    const void* input;
    const void* v;
    const double* mean;
    const double* rstd;
    Sums<5>* sums;
    Rows rows;
    Groups groups;
  };

  struct Body {
    Center<A> center;
    bool has_v;
    Sums<5>& sums;

    template <class B>
    __device__ void operator()(const B& batch) {
      A sum[5] = {0, 0, 0, 0, 0};
#pragma unroll
      for (int load = 0; load < B::kLoads; ++load) {
        if (load >= batch.valid) continue;
#pragma unroll
        for (int i = 0; i < B::kWidth; ++i) {
          A g = A(batch.get(0, load, i)), d = center(A(batch.get(1, load, i)));
          A v = has_v ? A(batch.get(2, load, i)) : A(0);
          sum[0] += g;
          sum[1] += g * d;
          sum[2] += v;
          sum[3] += v * d;
          sum[4] += v * g;
        }
      }
#pragma unroll
      for (int i = 0; i < 5; ++i) sums.value[i] += double(sum[i]);
    }
  };

  __device__ static void run(const Params& p) {
    Stretch s = Stretch::of_thread<kThreads>(p.rows);
    const T *g = static_cast<const T*>(p.grad_output), *v = static_cast<const T*>(p.v);
    const T* const input[3] = {g, static_cast<const T*>(p.input), v ? v : g};
    int64 group = s.exists ? p.groups.of(s) : 0;
    Sums<5> sums = Sums<5>::none();
    walk<32>(p.rows, s, input, Body{Center<A>(p.mean[group]), v != nullptr, sums});
#pragma unroll
    for (int i = 0; i < 5; ++i) sums.value[i] = s.team_sum(p.rows, sums.value[i]);
    sums.value[1] *= p.rstd[group];
    sums.value[3] *= p.rstd[group];
    if (s.exists && s.place == 0) p.sums[s.row * p.rows.slots + s.slot] = sums;
  }
};

template <class T>
struct SecondChannelGradients {
  static constexpr int kThreads = 256, kMinBlocks = 2;
  struct Params {
    const Sums<5>* sums;
    const Sums<7>* means;
    const double* rstd;
    void* grad_weight;
    Groups groups;
    int64 images;
    int64 channels;
    int64 slots;
    int64 width;
  };
  struct Terms {
    using Result = Sums<1>;
    __device__ static Sums<1> of(const Params& p, int64 image, int64 channel, const Sums<5>& s) {
      int64 group = image * p.groups.groups + quotient(channel, p.groups.channels_per_group);
      double mean_v = p.means[group].value[2], mean_vx = p.means[group].value[3];
      return Sums<1>{{p.rstd[group] * (s.value[4] - mean_v * s.value[0] - mean_vx * s.value[1])}};
    }
    __device__ static void store(const Params& p, int64 channel, const Sums<1>& sums) {
      static_cast<T*>(p.grad_weight)[channel] = from_accumulator<T>(sums.value[0]);
    }
  };
  __device__ static void run(const Params& p) {
    using Total = ChannelTotal<kThreads, Terms>;
    RAWKERN_SHARED(typename Total::Storage, shared);
    Total::run(shared, p);
  }
};

// Both gradients are linear in g, v and the deviation d = input - mean:
//     grad_g = v_to_g v + shared d + g_offset          grad_x = shared g + v_to_x v + slope d + x_offset
template <class T>
struct SecondGradients {
  static constexpr int kThreads = 256, kMinBlocks = 2;
  using A = Wide<T>;
  struct Params {
    const void* grad_output;
    const void* input;
    const void* v;
    void* grad_grad_output;
    void* grad_input;
    const double* mean;
    const double* rstd;
    const void* weight;
    const void* u;
    const void* t;
    const Sums<7>* means;
    Rows rows;
    Groups groups;
  };

  struct Body {
    Center<A> center;
    A shared, v_to_g, g_offset, v_to_x, slope, x_offset;
    T* grad_grad_output;
    T* grad_input;
    bool has_v;

    template <class B>
    __device__ void operator()(const B& batch) {
#pragma unroll
      for (int load = 0; load < B::kLoads; ++load) {
        if (load >= batch.valid) continue;
        Packed<T, B::kWidth> of_g, of_x;
#pragma unroll
        for (int i = 0; i < B::kWidth; ++i) {
          A g = A(batch.get(0, load, i)), d = center(A(batch.get(1, load, i)));
          A v = has_v ? A(batch.get(2, load, i)) : A(0);
          of_g.value[i] = from_accumulator<T>(v_to_g * v + (shared * d + g_offset));
          of_x.value[i] = from_accumulator<T>(shared * g + (v_to_x * v + (slope * d + x_offset)));
        }
        if (grad_grad_output) batch.store(grad_grad_output, load, of_g);
        if (grad_input) batch.store(grad_input, load, of_x);
      }
    }
  };

  __device__ static Body body_of(const Params& p, const Stretch& s) {
    int64 group = p.groups.of(s);
    double r = p.groups.factor(p.rows, p.rstd[group]), w = value_or<T>(p.weight, s.channel, 1);
    double u = value_or<T>(p.u, s.channel, 0), t = value_or<T>(p.t, s.channel, 0);
    Sums<7> means = p.means[group];
    double a = means.value[0], ax = means.value[1], v = means.value[2], vx = means.value[3], va = means.value[4];
    double c = means.value[5] - r * (ax * v + vx * a), cx = means.value[6] - 2 * r * ax * vx;
    double spread = va - v * a - vx * ax;
    return Body{Center<A>(p.mean[group]),
                A(r * (u - r * w * vx)),
                A(r * w),
                A(t - r * w * v),
                A(-r * r * ax),
                A(-r * r * cx - r * r * r * spread),
                A(-r * c),
                static_cast<T*>(p.grad_grad_output),
                static_cast<T*>(p.grad_input),
                p.v != nullptr};
  }

  __device__ static void run(const Params& p) {
    Stretch s = Stretch::of_thread<kThreads>(p.rows);
    if (!s.exists) return;
    const T *g = static_cast<const T*>(p.grad_output), *v = static_cast<const T*>(p.v);
    const T* const input[3] = {g, static_cast<const T*>(p.input), v ? v : g};
    walk<32>(p.rows, s, input, body_of(p, s));
  }
};

}  // namespace rawkern
