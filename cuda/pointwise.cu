// A chain of pointwise functions over a dense tensor: value, gradients, and gradients of the gradients.
//
// What is computed for an element is a Body (Forward, Backward, DoubleBackward); how elements are handed to threads is
//   Elementwise  a block takes kThreads * kUnroll neighbouring vectors of 16 bytes (single elements where memory is not
//                aligned or ends), loads all of them, computes, stores. The channel of an element, which chooses the
//                values of the chain's tensors, costs one 32-bit division per vector.
//   Reducing     warps walk the tensor by channel (channel_walk.cuh) because gradients of the chain's tensors are
//                summed on the way; ChannelTotals of channel_sum.cu adds up what the warps leave.
// Each input is read and each output written once. Any NVIDIA GPU; bound by memory.
#include "chain.cuh"
#include "channel_walk.cuh"

namespace rawkern {

// inputs: x; outputs: the chain's value
template <class T_, class Chain_>
struct Forward {
  using T = T_;
  using A = Accumulator<T>;
  using Chain = Chain_;
  static constexpr int kInputs = 1, kOutputs = 1;
  static constexpr bool kDirections = false;
  __device__ static void apply(const A* in, A* out, A*, const typename Chain::template Operands<T>& o, const A*) {
    out[0] = Chain::template value<T>(in[0], o);
  }
};

// inputs: gradient of the value, x; outputs: gradient of x; sums: gradients of the tensors
template <class T_, class Chain_>
struct Backward {
  using T = T_;
  using A = Accumulator<T>;
  using Chain = Chain_;
  static constexpr int kInputs = 2, kOutputs = 1;
  static constexpr bool kDirections = false;
  __device__ static void apply(const A* in, A* out, A* sums, const typename Chain::template Operands<T>& o, const A*) {
    out[0] = Chain::template backward<T>(in[0], in[1], o, sums);
  }
};

// inputs: gradient of the value, x, gradient of Backward's gradient of x; directions: the same for the tensors;
// outputs: gradients of the gradient of the value and of x; sums: gradients of the tensors
template <class T_, class Chain_>
struct DoubleBackward {
  using T = T_;
  using A = Accumulator<T>;
  using Chain = Chain_;
  static constexpr int kInputs = 3, kOutputs = 2;
  static constexpr bool kDirections = true;
  __device__ static void apply(const A* in, A* out, A* sums, const typename Chain::template Operands<T>& o,
                               const A* dp) {
    out[1] = Chain::template double_backward<T>(in[0], in[1], in[2], o, dp, sums, out[0]);
  }
};

template <class Chain>
struct PointwiseParams {
  const void* inputs[3];  // null: zero
  void* outputs[2];       // null: not wanted
  double* partials;
  typename Chain::Params chain;
  const void* directions[Chain::kTensorSlots];  // null: zero
  ChannelLayout layout;
};

// What a Body needs to know of one channel.
template <class Body>
struct ChannelValues {
  using T = typename Body::T;
  using A = Accumulator<T>;
  using Chain = typename Body::Chain;
  typename Chain::template Operands<T> operands;
  A directions[Chain::kTensorSlots];

  __device__ void load(const PointwiseParams<Chain>& params, int64 channel) {
    operands.load_tensors(params.chain, channel);
    if constexpr (Body::kDirections) {
#pragma unroll
      for (int i = 0; i < Chain::kTensorCount; ++i) {
        const T* values = static_cast<const T*>(params.directions[i]);
        directions[i] = values ? to_accumulator(values[channel * params.chain.strides[i]]) : A(0);
      }
    }
  }
};

template <class Body>
struct Elementwise {
  using T = typename Body::T;
  using A = Accumulator<T>;
  using Chain = typename Body::Chain;
  using Params = PointwiseParams<Chain>;
  static constexpr int kThreads = 256, kMinBlocks = 2;
  static constexpr int kWidth = 16 / int(sizeof(T)), kUnroll = Body::kInputs == 1 ? 4 : 2;
  static constexpr int kBlockElements = kThreads * kWidth * kUnroll;
  using V = ValueVector<T, kWidth>;

  // Where the elements of a block lie among rows and channels.
  struct Place {
    int64 in_row, channel;
    __device__ Place(const ChannelLayout& layout, int64 first) {
      int64 row = first / layout.inner;
      in_row = first - row * layout.inner;
      channel = row % layout.channels;
    }
    // The channel of the block's element number `local`, and in `left` how many elements its row still has from there.
    __device__ int64 find(const ChannelLayout& layout, int local, int64& left) const {
      int64 position = in_row + local, passed = 0, result = channel;
      if (position >= layout.inner) {
        passed = layout.inner < kLarge ? unsigned(position) / unsigned(layout.inner) : 1;
        result += passed;
        if (result >= layout.channels)
          result = layout.channels < kLarge ? unsigned(result) % unsigned(layout.channels) : result - layout.channels;
      }
      left = (passed + 1) * layout.inner - position;
      return result;
    }
  };
  static constexpr int64 kLarge = int64(1) << 31;

  // Only gradients of gradients are often not there; a kernel that allows for it issues its loads later.
  static constexpr bool kMayLackInputs = Body::kDirections;
  __device__ static bool has_inputs(const Params& params) {
    bool all = true;
#pragma unroll
    for (int k = 0; k < Body::kInputs; ++k) all = all && params.inputs[k];
    return all;
  }

  __device__ static void run(const Params& params) {
    const ChannelLayout& layout = params.layout;
    int64 first = linear_block() * kBlockElements;
    if (first >= layout.total) return;
    ChannelValues<Body> values;
    values.operands.load_numbers(params.chain);
    if (Chain::kTensorCount == 0) values.load(params, 0);
    Place place(layout, Chain::kTensorCount > 0 ? first : 0);
    int end = layout.total - first < kBlockElements ? int(layout.total - first) : kBlockElements, begin = 0;
    if (layout.vector && (kMayLackInputs || has_inputs(params))) {
      run_vectors(params, first, end, place, values);
      begin = end - end % kWidth;
    }
    run_elements(params, first, begin, end, place, values);
  }

  // A thread issues all its loads before it uses any of them: nothing but the end of memory is asked on the way.
  __device__ static void run_vectors(const Params& params, int64 first, int end, const Place& place,
                                     ChannelValues<Body>& values) {
    V loaded[kUnroll][Body::kInputs];
#pragma unroll
    for (int k = 0; k < Body::kInputs; ++k) {
      const T* input = static_cast<const T*>(params.inputs[k]) + first + int(threadIdx.x) * kWidth;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        int local = (u * kThreads + int(threadIdx.x)) * kWidth;
        if (kMayLackInputs && !params.inputs[k])
          loaded[u][k] = V{};
        else if (local + kWidth <= end)
          loaded[u][k] = *reinterpret_cast<const V*>(input + u * kThreads * kWidth);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int local = (u * kThreads + int(threadIdx.x)) * kWidth;
      int64 left = 0, channel = 0;
      if (Chain::kTensorCount > 0) {
        channel = place.find(params.layout, local, left);
        values.load(params, channel);
      }
      A results[Body::kOutputs][kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (Chain::kTensorCount > 0 && left-- == 0) {
          left = params.layout.inner - 1;
          if (++channel == params.layout.channels) channel = 0;
          values.load(params, channel);
        }
        A in[Body::kInputs], out[Body::kOutputs];
#pragma unroll
        for (int k = 0; k < Body::kInputs; ++k) in[k] = loaded[u][k].get(i);
        apply(in, out, values);
#pragma unroll
        for (int k = 0; k < Body::kOutputs; ++k) results[k][i] = out[k];
      }
#pragma unroll
      for (int k = 0; k < Body::kOutputs; ++k) {
        V result;
        result.set(results[k]);
        if (params.outputs[k] && local + kWidth <= end)
          *reinterpret_cast<V*>(static_cast<T*>(params.outputs[k]) + first + local) = result;
      }
    }
  }

  // One at a time, kUnroll of them under way: where memory is not aligned, and the last ones.
  __device__ static void run_elements(const Params& params, int64 first, int begin, int end, const Place& place,
                                      ChannelValues<Body>& values) {
#pragma unroll 1
    for (int base = begin + threadIdx.x; base < end; base += kUnroll * kThreads) {
      A in[kUnroll][Body::kInputs];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        int local = base + u * kThreads;
#pragma unroll
        for (int k = 0; k < Body::kInputs; ++k) {
          const T* input = static_cast<const T*>(params.inputs[k]) + first;
          in[u][k] = local < end && params.inputs[k] ? to_accumulator(input[local]) : A(0);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        int local = base + u * kThreads;
        if (local >= end) break;
        if (Chain::kTensorCount > 0) {
          int64 left;
          values.load(params, place.find(params.layout, local, left));
        }
        A out[Body::kOutputs];
        apply(in[u], out, values);
#pragma unroll
        for (int k = 0; k < Body::kOutputs; ++k)
          if (params.outputs[k]) static_cast<T*>(params.outputs[k])[first + local] = from_accumulator<T>(out[k]);
      }
    }
  }

  __device__ static void apply(const A* in, A* out, const ChannelValues<Body>& values) {
    A unused[Chain::kTensorSlots] = {};
    Body::apply(in, out, unused, values.operands, values.directions);
  }
};

template <class Body, template <int> class Walk>
struct Reducing {
  using T = typename Body::T;
  using A = Accumulator<T>;
  using Chain = typename Body::Chain;
  using Params = PointwiseParams<Chain>;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSums = Chain::kTensorSlots;

  template <int kCount>
  struct Element {
    ChannelValues<Body> values[kCount];
    __device__ void operator()(const A* in, A* out, A* sums, int i) const {
      const ChannelValues<Body>& v = values[kCount == 1 ? 0 : i];
      Body::apply(in, out, sums, v.operands, v.directions);
    }
  };

  template <int kWidth>
  __device__ static void run_width(const Params& params) {
    constexpr int kUnroll = kWidth * sizeof(T) < 16 ? 4 : 2;
    Walk<kWidth> walk(params.layout, linear_block() * (kThreads / kWarp) + threadIdx.x / kWarp);
    constexpr int kCount = Walk<kWidth>::kOneChannel ? 1 : kWidth;
    Element<kCount> element;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      element.values[i].operands.load_numbers(params.chain);
      if (walk.more()) element.values[i].load(params, walk.channel(i));
    }
    A sums[kWidth][kSums] = {};
    walk_channels<T, kWidth, kUnroll, Body::kInputs, Body::kOutputs>(walk, params.inputs, params.outputs, sums,
                                                                     element);
    walk.store(params.partials, sums);
  }

  __device__ static void run(const Params& params) { run_with_width<Reducing, T>(params); }
};

}  // namespace rawkern
