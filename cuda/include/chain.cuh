// Chains of pointwise functions, composed as types: Chain<1, 0, Add<Number<0>>, GeluErf> is gelu(x + number 0).
//
// Numbers and per-channel tensors are run-time parameters, so a new number compiles nothing. Value, gradient and second
// order are generated here from what each function states about itself (pointwise_functions.cuh):
//   value            y = f(x, p)
//   backward         for a gradient g of y: g dy/dx, and g dy/dp for each tensor operand p
//   double_backward  of L = g * t, where t = dy/dx * dx + sum dy/dp * dp is the derivative of y in the direction
//                    (dx, dp). The pair (value, tangent) runs forward through the chain and its adjoint back.
#pragma once
#include "pointwise_functions.cuh"

namespace rawkern {

// The adjoints of a value and of its tangent.
template <class A>
struct Adjoint {
  A value, tangent;
};

template <class... Functions>
struct Composition;

template <>
struct Composition<> {
  template <class A, class O>
  __device__ static A value(A x, const O&) {
    return x;
  }
  template <class A, class O>
  __device__ static A backward(A g, A, const O&, A*) {
    return g;
  }
  template <class A, class O>
  __device__ static Adjoint<A> double_backward(A g, A, A dx, const O&, const A*, A*, A& tangent) {
    tangent = dx;
    return Adjoint<A>{A(0), g};
  }
};

template <class F, class... Rest>
struct Composition<F, Rest...> {
  using Next = Composition<Rest...>;

  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return Next::value(F::value(x, o), o);
  }

  // Returns the gradient of x for the gradient g of the result; adds the gradients of the tensors to `sums`.
  template <class A, class O>
  __device__ static A backward(A g, A x, const O& o, A* sums) {
    g = Next::backward(g, F::value(x, o), o, sums);
    if constexpr (F::kTensor >= 0) sums[F::kTensor] += F::first_operand(g, x, o);
    return F::first(g, x, o);
  }

  // dx and dp are the direction, `tangent` becomes the derivative of the result in that direction; `sums` as above.
  template <class A, class O>
  __device__ static Adjoint<A> double_backward(A g, A x, A dx, const O& o, const A* dp, A* sums, A& tangent) {
    A dy = F::first(dx, x, o);
    if constexpr (F::kTensor >= 0) dy += F::first_operand(dp[F::kTensor], x, o);
    Adjoint<A> above = Next::double_backward(g, F::value(x, o), dy, o, dp, sums, tangent);
    Adjoint<A> result{F::second(above.tangent * dx, x, o), F::first(above.tangent, x, o)};
    // The result's value itself does not enter L: its adjoint is no product to form (0 * inf would be NaN) but absent.
    if constexpr (sizeof...(Rest) > 0) result.value += F::first(above.value, x, o);
    if constexpr (F::kTensor >= 0) {
      result.value += F::mixed(above.tangent * dp[F::kTensor], x, o);
      sums[F::kTensor] += F::mixed(above.tangent * dx, x, o) + F::second_operand(above.tangent * dp[F::kTensor], x, o);
      if constexpr (sizeof...(Rest) > 0) sums[F::kTensor] += F::first_operand(above.value, x, o);
    }
    return result;
  }
};

template <int kNumbers, int kTensors, class... Functions>
struct Chain {
  static constexpr int kTensorCount = kTensors;
  static constexpr int kNumberSlots = kNumbers > 0 ? kNumbers : 1, kTensorSlots = kTensors > 0 ? kTensors : 1;
  using Steps = Composition<Functions...>;

  struct Params {
    double numbers[kNumberSlots];
    const void* tensors[kTensorSlots];
    int64 strides[kTensorSlots];  // 1: one value per channel; 0: one value for all
  };

  // The numbers, and the tensors' values for one channel.
  template <class T>
  struct Operands {
    using Element = T;
    using A = Accumulator<T>;
    A numbers[kNumberSlots];
    A tensors[kTensorSlots];

    __device__ Operands() {}
    __device__ Operands(const Params& params, int64 channel) {
      load_numbers(params);
      load_tensors(params, channel);
    }
    __device__ void load_numbers(const Params& params) {
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) numbers[i] = A(params.numbers[i]);
      (Functions::template prepare<T>(*this), ...);
    }
    __device__ void load_tensors(const Params& params, int64 channel) {
#pragma unroll
      for (int i = 0; i < kTensors; ++i)
        tensors[i] = to_accumulator(static_cast<const T*>(params.tensors[i])[channel * params.strides[i]]);
    }
  };

  template <class T>
  __device__ static Accumulator<T> value(Accumulator<T> x, const Operands<T>& o) {
    return Steps::value(x, o);
  }

  // d value / d x
  template <class T>
  __device__ static Accumulator<T> derivative(Accumulator<T> x, const Operands<T>& o) {
    Accumulator<T> unused[kTensorSlots] = {};
    return Steps::backward(Accumulator<T>(1), x, o, unused);
  }

  // g * d value / d x; g * d value / d tensor is added to sums[tensor].
  template <class T>
  __device__ static Accumulator<T> backward(Accumulator<T> g, Accumulator<T> x, const Operands<T>& o,
                                            Accumulator<T>* sums) {
    return Steps::backward(g, x, o, sums);
  }

  // The gradients by g, x and the tensors of g * (derivative of the value in the direction (dx, dp)): returns the one
  // by x, stores the one by g in `tangent`, adds those by the tensors to `sums`.
  template <class T>
  __device__ static Accumulator<T> double_backward(Accumulator<T> g, Accumulator<T> x, Accumulator<T> dx,
                                                   const Operands<T>& o, const Accumulator<T>* dp, Accumulator<T>* sums,
                                                   Accumulator<T>& tangent) {
    return Steps::double_backward(g, x, dx, o, dp, sums, tangent).value;
  }
};

}  // namespace rawkern
