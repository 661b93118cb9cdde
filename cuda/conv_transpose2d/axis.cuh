// One axis (height or width) of a transposed convolution and of its adjoint, as gathers.
//
// Both compute out[i] = sum over taps j of in[position(i, j)] * weight[tap(j)] where positions and taps are arithmetic
// progressions. The transposed convolution y[o] = sum x[(o + padding - k dilation) / stride] w[k] over the k that
// divide splits into phases, o = phase modulo stride: with g = gcd(dilation, stride), the taps of a phase are every
// (stride / g)th from the first k with k dilation = o + padding (modulo stride), and from tap to tap the position falls
// by dilation / g. Nothing is multiplied by an inserted zero. A phase may have no taps; its sum is empty. The input
// gradient of the transposed convolution is an ordinary convolution, one phase with all taps.
#pragma once
#include "platform.cuh"

namespace rawkern {

// As the host passes it; `inverse` is that of dilation / gcd modulo stride / gcd.
struct Axis {
  int in_size, out_size, kernel, stride, padding, dilation, gcd, inverse;
};

// Elements first, first + step, ... (count of them) of the output; element i, tap j reads position
// in_first + i in_step + j in_tap_step and weight tap_first + j tap_step.
struct AxisPhase {
  int count, out_first, out_step, in_first, in_step, tap_first, tap_step, taps, in_tap_step;
};

struct TransposedMap {
  __device__ static int phases(const Axis& axis) { return axis.stride < axis.out_size ? axis.stride : axis.out_size; }

  __device__ static AxisPhase phase(const Axis& axis, int phase) {
    int remainder = (phase + axis.padding) % axis.stride, period = axis.stride / axis.gcd;
    AxisPhase result;
    result.count = phase < axis.out_size ? (axis.out_size - 1 - phase) / axis.stride + 1 : 0;
    result.out_first = phase;
    result.out_step = axis.stride;
    result.in_step = 1;
    result.tap_step = period;
    result.in_tap_step = -(axis.dilation / axis.gcd);
    result.tap_first = int(int64(remainder / axis.gcd) * axis.inverse % period);
    bool reachable = remainder % axis.gcd == 0 && result.tap_first < axis.kernel;
    result.taps = reachable ? (axis.kernel - 1 - result.tap_first) / period + 1 : 0;
    result.in_first = reachable ? (phase + axis.padding - result.tap_first * axis.dilation) / axis.stride : 0;
    return result;
  }
};

struct ConvolutionMap {
  __device__ static int phases(const Axis&) { return 1; }

  __device__ static AxisPhase phase(const Axis& axis, int) {
    return AxisPhase{axis.out_size, 0, 1, -axis.padding, axis.stride, 0, 1, axis.kernel, axis.dilation};
  }
};

}  // namespace rawkern
