// The vocabulary of pointwise functions: value, first and second derivatives of each.
//
// A function is a struct with static members, x being its input and o the operands of its chain (chain.cuh):
//     value(x, o)                  f(x)
//     first(g, x, o)               g * df/dx
//     second(g, x, o)              g * d2f/dx2
// The derivatives take the factor g because torch selects where others multiply: a ReLU's gradient at -1 is 0, also for
// an infinite g. Functions of an operand p (a Number, or a Tensor, which has a gradient of its own) add
//     first_operand(g, x, o)       g * df/dp
//     mixed(g, x, o)               g * d2f/dx dp
//     second_operand(g, x, o)      g * d2f/dp2
// At kinks, ties, NaN and infinities all of them follow torch's formula for the function of that name (its CUDA kernels
// where the vectorised CPU ones differ, as for the derivative of hardtanh, elu and hardswish at NaN). Away from those
// they are computed so that nothing overflows or cancels on the way.
#pragma once
#include "element.cuh"
#include "normal.cuh"

namespace rawkern {

namespace math {
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float expm1_of(float x) { return expm1f(x); }
__device__ inline double expm1_of(double x) { return expm1(x); }
__device__ inline float log1p_of(float x) { return log1pf(x); }
__device__ inline double log1p_of(double x) { return log1p(x); }
__device__ inline float tanh_of(float x) { return tanhf(x); }
__device__ inline double tanh_of(double x) { return tanh(x); }

template <class A>
__device__ inline bool is_nan(A x) {
  return x != x;
}
// The smaller and the larger of two numbers; NaN if one of them is. In float that is one instruction.
template <class A>
__device__ inline A smaller(A a, A b) {
  return a < b || is_nan(a) ? a : b;
}
template <class A>
__device__ inline A larger(A a, A b) {
  return a > b || is_nan(a) ? a : b;
}
#if RAWKERN_GPU
__device__ inline float smaller(float a, float b) {
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
__device__ inline float larger(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
#endif
template <class A>
__device__ inline A magnitude(A x) {
  return fabs(x);
}

// Zero instead of a value where the condition holds: a selection, where the compiler makes a branch of one that saves
// it a multiplication.
__device__ inline float unless(bool condition, float value) {
#if RAWKERN_GPU
  float result;
  asm("{\n"
      ".reg .pred holds;\n"
      "setp.ne.s32 holds, %2, 0;\n"
      "selp.f32 %0, 0f00000000, %1, holds;\n"
      "}\n"
      : "=f"(result)
      : "f"(value), "r"(int(condition)));
  return result;
#else
  return condition ? 0.0f : value;
#endif
}
__device__ inline double unless(bool condition, double value) { return condition ? 0.0 : value; }

// The logistic function at x and its complement 1 - s, both to full relative precision.
template <class A>
struct Logistic {
  A s, c;
  __device__ explicit Logistic(A x) {
    A e = exp_of(-magnitude(x)), large = A(1) / (A(1) + e), small = e * large;
    s = x < A(0) ? small : large;
    c = x < A(0) ? large : small;
  }
};
}  // namespace math

// Operands of functions: numbers of the chain and per-channel values of its tensors.
template <int kIndex>
struct Number {
  static constexpr int kTensor = -1;
  template <class O>
  __device__ static typename O::A get(const O& o) {
    return o.numbers[kIndex];
  }
  // Rounds the number to the tensors' element type, as torch does before it compares.
  template <class T, class O>
  __device__ static void round(O& o) {
    o.numbers[kIndex] = to_accumulator(from_accumulator<T>(o.numbers[kIndex]));
  }
};
template <int kIndex>
struct Tensor {
  static constexpr int kTensor = kIndex;
  template <class O>
  __device__ static typename O::A get(const O& o) {
    return o.tensors[kIndex];
  }
};

// What a function has unless it says otherwise: no tensor operand, numbers that stay as they are.
struct Function {
  static constexpr int kTensor = -1;
  template <class T, class O>
  __device__ static void prepare(O&) {}
};

// A function whose second derivative by x is zero.
struct PiecewiseLinear : Function {
  template <class A, class O>
  __device__ static A second(A, A, const O&) {
    return A(0);
  }
};

template <class P>
struct Binary : PiecewiseLinear {
  static constexpr int kTensor = P::kTensor;
  template <class A, class O>
  __device__ static A mixed(A, A, const O&) {
    return A(0);
  }
  template <class A, class O>
  __device__ static A second_operand(A, A, const O&) {
    return A(0);
  }
};

template <class P>
struct Add : Binary<P> {
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return x + P::get(o);
  }
  template <class A, class O>
  __device__ static A first(A g, A, const O&) {
    return g;
  }
  template <class A, class O>
  __device__ static A first_operand(A g, A, const O&) {
    return g;
  }
};

template <class P>
struct Sub : Binary<P> {
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return x - P::get(o);
  }
  template <class A, class O>
  __device__ static A first(A g, A, const O&) {
    return g;
  }
  template <class A, class O>
  __device__ static A first_operand(A g, A, const O&) {
    return -g;
  }
};

template <class P>
struct Mul : Binary<P> {
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return x * P::get(o);
  }
  template <class A, class O>
  __device__ static A first(A g, A, const O& o) {
    return g * P::get(o);
  }
  template <class A, class O>
  __device__ static A first_operand(A g, A x, const O&) {
    return g * x;
  }
  template <class A, class O>
  __device__ static A mixed(A g, A, const O&) {
    return g;
  }
};

template <class P>
struct Div : Binary<P> {
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return x / P::get(o);
  }
  template <class A, class O>
  __device__ static A first(A g, A, const O& o) {
    return g / P::get(o);
  }
  template <class A, class O>
  __device__ static A first_operand(A g, A x, const O& o) {
    return -g * ((x / P::get(o)) / P::get(o));
  }
  template <class A, class O>
  __device__ static A mixed(A g, A, const O& o) {
    return -(g / P::get(o)) / P::get(o);
  }
  template <class A, class O>
  __device__ static A second_operand(A g, A x, const O& o) {
    return A(2) * g * (((x / P::get(o)) / P::get(o)) / P::get(o));
  }
};

// torch.minimum and torch.maximum with a number: NaN wins, a tie passes half of the gradient.
template <class P>
struct Minimum : PiecewiseLinear {
  template <class T, class O>
  __device__ static void prepare(O& o) {
    P::template round<T>(o);
  }
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return math::smaller(x, P::get(o));
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O& o) {
    return math::unless(x > P::get(o), g * (x == P::get(o) ? A(0.5) : A(1)));
  }
};

template <class P>
struct Maximum : PiecewiseLinear {
  template <class T, class O>
  __device__ static void prepare(O& o) {
    P::template round<T>(o);
  }
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return math::larger(x, P::get(o));
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O& o) {
    return math::unless(x < P::get(o), g * (x == P::get(o) ? A(0.5) : A(1)));
  }
};

// torch.clamp: a tie passes the whole gradient, a NaN none; a NaN bound makes everything NaN; a minimum above the
// maximum makes everything the maximum.
template <class P>
struct ClampMin : PiecewiseLinear {
  template <class T, class O>
  __device__ static void prepare(O& o) {
    P::template round<T>(o);
  }
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return math::larger(x, P::get(o));
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O& o) {
    return x >= P::get(o) ? g : A(0);
  }
};

template <class P>
struct ClampMax : PiecewiseLinear {
  template <class T, class O>
  __device__ static void prepare(O& o) {
    P::template round<T>(o);
  }
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return math::smaller(x, P::get(o));
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O& o) {
    return x <= P::get(o) ? g : A(0);
  }
};

template <class Low, class High>
struct Clamp : PiecewiseLinear {
  template <class T, class O>
  __device__ static void prepare(O& o) {
    Low::template round<T>(o);
    High::template round<T>(o);
  }
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return ClampMax<High>::value(ClampMin<Low>::value(x, o), o);
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O& o) {
    return x >= Low::get(o) && x <= High::get(o) ? g : A(0);
  }
};

// torch.nn.functional.hardtanh: a clamp whose derivative is 0 at ties. Its limits are not rounded before comparing.
template <class Low, class High>
struct Hardtanh : Clamp<Low, High> {
  template <class T, class O>
  __device__ static void prepare(O&) {}
  template <class A, class O>
  __device__ static A first(A g, A x, const O& o) {
    return x <= Low::get(o) || x >= High::get(o) ? A(0) : g;
  }
};

struct ReLU : PiecewiseLinear {
  template <class A, class O>
  __device__ static A value(A x, const O&) {
    return x < A(0) ? A(0) : x;
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O&) {
    return x <= A(0) ? A(0) : g;
  }
};

template <class Slope>
struct LeakyReLU : PiecewiseLinear {
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return x > A(0) ? x : x * Slope::get(o);
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O& o) {
    return x > A(0) ? g : g * Slope::get(o);
  }
};

template <class Alpha>
struct ELU : Function {
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    return x <= A(0) ? Alpha::get(o) * math::expm1_of(x) : x;
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O& o) {
    return x <= A(0) ? g * (Alpha::get(o) * math::exp_of(x)) : g;
  }
  template <class A, class O>
  __device__ static A second(A g, A x, const O& o) {
    return x < A(0) ? g * (Alpha::get(o) * math::exp_of(x)) : A(0);
  }
};

// x * logistic(x)
struct SiLU : Function {
  template <class A, class O>
  __device__ static A value(A x, const O&) {
    return x * math::Logistic<A>(x).s;
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O&) {
    math::Logistic<A> l(x);
    return g * (l.s + x * l.c * l.s);
  }
  template <class A, class O>
  __device__ static A second(A g, A x, const O&) {
    math::Logistic<A> l(x);
    A slope = l.s * l.c;
    return g * (A(2) * slope + slope * x * (l.c - l.s));
  }
};

// x * t with t = tanh(log(1 + exp(x))). With e = exp(-|x|), t = n / (n + 2) for n = exp(x) * (exp(x) + 2) becomes a
// ratio of polynomials in e, and so does 1 - t.
struct Mish : Function {
  template <class A>
  struct Terms {
    A t, first, second;  // t and its derivatives by x
    __device__ explicit Terms(A x) {
      A e = math::exp_of(-math::magnitude(x)), inverse = A(1) / (A(1) + e);
      bool negative = x < A(0);
      A s = negative ? e * inverse : inverse, c = negative ? inverse : e * inverse;
      A numerator = negative ? e * (e + A(2)) : A(1) + A(2) * e;
      A rest = negative ? A(2) : A(2) * e * e;
      A scale = A(1) / (numerator + rest);
      t = numerator * scale;
      first = rest * scale * (A(1) + t) * s;
      second = first * (c - A(2) * t * s);
    }
  };
  template <class A, class O>
  __device__ static A value(A x, const O&) {
    return x * Terms<A>(x).t;
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O&) {
    Terms<A> m(x);
    return g * (m.t + x * m.first);
  }
  template <class A, class O>
  __device__ static A second(A g, A x, const O&) {
    Terms<A> m(x);
    return g * (A(2) * m.first + x * m.second);
  }
};

struct Hardswish : Function {
  template <class A, class O>
  __device__ static A value(A x, const O&) {
    A shifted = x + A(3);
    return x * ((shifted < A(0) ? A(0) : (shifted > A(6) ? A(6) : shifted)) / A(6));
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O&) {
    return x <= A(-3) ? A(0) : (x < A(3) ? g * (x / A(3) + A(0.5)) : g);
  }
  template <class A, class O>
  __device__ static A second(A g, A x, const O&) {
    return x > A(-3) && x < A(3) ? g / A(3) : A(0);
  }
};

struct Sigmoid : Function {
  template <class A, class O>
  __device__ static A value(A x, const O&) {
    return math::Logistic<A>(x).s;
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O&) {
    math::Logistic<A> l(x);
    return g * (l.s * l.c);
  }
  template <class A, class O>
  __device__ static A second(A g, A x, const O&) {
    math::Logistic<A> l(x);
    return g * (l.s * l.c * (l.c - l.s));
  }
};

// tanh(x), whose derivative 1 - tanh(x)^2 is 4 s (1 - s) for the logistic function s of 2x.
struct Tanh : Function {
  template <class A, class O>
  __device__ static A value(A x, const O&) {
    return math::tanh_of(x);
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O&) {
    math::Logistic<A> l(A(2) * x);
    return g * (A(4) * l.s * l.c);
  }
  template <class A, class O>
  __device__ static A second(A g, A x, const O& o) {
    return first(A(-2) * g * math::tanh_of(x), x, o);
  }
};

// log(1 + exp(beta x)) / beta, and x itself where beta x passes the threshold.
template <class Beta, class Threshold>
struct Softplus : Function {
  template <class A, class O>
  __device__ static A value(A x, const O& o) {
    A z = x * Beta::get(o);
    if (z > Threshold::get(o)) return x;
    return ((z > A(0) ? z : A(0)) + math::log1p_of(math::exp_of(-math::magnitude(z)))) / Beta::get(o);
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O& o) {
    A z = x * Beta::get(o);
    return z > Threshold::get(o) ? g : g * math::Logistic<A>(z).s;
  }
  template <class A, class O>
  __device__ static A second(A g, A x, const O& o) {
    A z = x * Beta::get(o);
    math::Logistic<A> l(z);
    return z >= Threshold::get(o) ? A(0) : g * (Beta::get(o) * (l.s * l.c));
  }
};

// Whether the values that a chain with the operands O begins and ends with are of 16 bits.
template <class O>
constexpr bool kIsBrief = sizeof(typename O::Element) == 2;

// Operands where a function is not part of a chain and has none: it computes as for element type T.
template <class T>
struct NoOperands {
  using Element = T;
};

// x * Phi(x). Products with the density are formed so that they stay 0 where it is 0, and are NaN only at infinities,
// as in torch.
struct GeluErf : Function {
  template <class A, class O>
  __device__ static A value(A x, const O&) {
    if constexpr (kIsBrief<O>) return x * math::brief_normal_cumulative(x);
    return x * math::normal_cumulative(x);
  }
  template <class A, class O>
  __device__ static A first(A g, A x, const O&) {
    if constexpr (kIsBrief<O>) return g * math::brief_gelu_derivative(x);
    return g * (math::normal_cumulative(x) + x * math::normal_density(x));
  }
  template <class A, class O>
  __device__ static A second(A g, A x, const O&) {
    A p = math::normal_density(x);
    return g * (A(2) * p - p * x * x);
  }
};

// x (1 + tanh(u)) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3), which is x * logistic(2u).
struct GeluTanh : Function {
  static constexpr double kScale = 1.59576912160573071176, kCube = 0.044715, kLog2E = 1.44269504088896340736;
  // exp(-2u) by way of 2u / x = kScale (1 + kCube x^2)
  template <class A>
  __device__ static A exponential(A x) {
    return math::fast_exp2(x * (A(-kLog2E * kScale) + A(-kLog2E * kScale * kCube) * (x * x)));
  }
  template <class A, class O>
  __device__ static A value(A x, const O&) {
    return x * math::fast_reciprocal(A(1) + exponential(x));
  }
  // |x|, limited to where all but the logistic function itself has long been 0, and d(2u)/dx there.
  template <class A>
  struct Bounded {
    A x, w;
    __device__ explicit Bounded(A signed_x) : x(fmin(math::magnitude(signed_x), A(30))) {
      w = A(kScale) + A(3 * kScale * kCube) * (x * x);
    }
  };
  template <class A, class O>
  __device__ static A first(A g, A x, const O&) {
    Bounded<A> b(x);
    A e = exponential(b.x), large = math::fast_reciprocal(A(1) + e), small = e * large;
    return g * ((x < A(0) ? small : large) + x * (small * large * b.w));
  }
  // An even function, as that of the erf form with the slower exponential.
  template <class A, class O>
  __device__ static A second(A g, A x, const O&) {
    Bounded<A> b(x);
    math::Logistic<A> l(b.x * (A(kScale) + A(kScale * kCube) * (b.x * b.x)));
    A slope = l.s * l.c, bend = (l.c - l.s) * b.w * b.w + A(6 * kScale * kCube) * b.x;
    return g * (A(2) * slope * b.w + math::magnitude(x) * slope * bend);
  }
};

}  // namespace rawkern
