// One axis (height or width) of a tile of the transposed convolution or of the convolution, for a kernel, stride and
// dilation known at compile time: which inputs a number of neighbouring outputs need, and which of them each output and
// tap meet. axis.cuh says the same for sizes known at run time.
#pragma once
#include "axis.cuh"

namespace rawkern {

__host__ __device__ constexpr int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }

// One axis of the transposed convolution. Outputs are counted from `padding` before the first, so that the phase of
// output i is i modulo stride; output i and tap k meet at input (i - k dilation) / stride. Rows of a block begin at a
// multiple of the stride, so that the phase of each of a thread's rows is known at compile time; columns begin lead()
// after one, at the tensor's first column, where its memory may be aligned.
template <int kKernel_, int kStride_, int kDilation>
struct TransposedAxis {
  static constexpr int kKernel = kKernel_, kStride = kStride_;
  static constexpr int kGcd = greatest_divisor(kDilation, kStride), kPeriod = kStride / kGcd;
  static constexpr int kPhases = kStride, kUnit = kStride, kInStep = 1;
  static constexpr int kSlots = (kKernel + kPeriod - 1) / kPeriod;  // taps of a phase, at most
  static constexpr bool kUneven = kGcd > 1 || kKernel % kPeriod != 0;
  static constexpr int kHalo = (kKernel - 1) * kDilation / kStride;

  __host__ __device__ static constexpr int extent(int outputs) { return outputs / kStride + kHalo; }
  // Of columns: inputs that are staged, and the elements they take.
  __host__ __device__ static constexpr int staged(int outputs) { return extent(outputs) + (kStride > 1); }
  __host__ __device__ static constexpr int row_length(int outputs) { return staged(outputs) + kUneven; }
  __host__ __device__ static constexpr int place(int position, int) { return position; }
  __device__ static int first_output(const Axis& axis) { return axis.padding / kStride * kStride; }
  __device__ static int shift(const Axis& axis) { return axis.padding; }
  __device__ static int lead(const Axis& axis) { return axis.padding % kStride; }
  __device__ static int origin(const Axis&, int output) { return output / kStride - kHalo; }
  __host__ __device__ static constexpr int first_line(int output) { return output / kStride; }

  // The staged line that output m of a thread and tap k meet at; -1 if they do not.
  __host__ __device__ static constexpr int line(int m, int k) {
    return (m - k * kDilation) % kStride == 0 ? (m - k * kDilation) / kStride + kHalo : -1;
  }
  __host__ __device__ static constexpr int phase_of(int k) { return k * kDilation % kStride; }
  __host__ __device__ static constexpr int slot_of(int k) { return k / kPeriod; }

  // Where the taps of an output column find their input in a staged line.
  __device__ static void places(int (&at)[kSlots], int column, int outputs) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) at[slot] = staged(outputs);  // always zero
#pragma unroll
    for (int k = 0; k < kKernel; ++k) {
      int from = column - k * kDilation + kHalo * kStride;
      if (!kUneven && kStride == 1)
        at[k] = from;
      else if (column % kStride == phase_of(k))
        at[slot_of(k)] = from / kStride;
    }
  }
};

// One axis of the convolution: output i and tap k meet at input i stride - padding + k dilation. Only every gcd-th
// input is ever met; of those, neighbouring outputs meet every kPeriod-th: staged lines are sorted by that.
template <int kKernel_, int kStride, int kDilation>
struct ConvolutionAxis {
  static constexpr int kKernel = kKernel_;
  static constexpr int kGcd = greatest_divisor(kDilation, kStride), kPeriod = kStride / kGcd;
  static constexpr int kStep = kDilation / kGcd;
  static constexpr int kPhases = 1, kUnit = 1, kInStep = kGcd, kSlots = kKernel;
  static constexpr bool kUneven = false;

  __host__ __device__ static constexpr int extent(int outputs) {
    return (outputs - 1) * kPeriod + (kKernel - 1) * kStep + 1;
  }
  __host__ __device__ static constexpr int staged(int outputs) { return extent(outputs); }
  __host__ __device__ static constexpr int sorted(int outputs) { return (extent(outputs) + kPeriod - 1) / kPeriod; }
  __host__ __device__ static constexpr int row_length(int outputs) { return sorted(outputs) * kPeriod; }
  __host__ __device__ static constexpr int place(int position, int outputs) {
    return position % kPeriod * sorted(outputs) + position / kPeriod;
  }
  __device__ static int first_output(const Axis&) { return 0; }
  __device__ static int shift(const Axis&) { return 0; }
  __device__ static int lead(const Axis&) { return 0; }
  __device__ static int origin(const Axis& axis, int output) { return output * kStride - axis.padding; }
  __host__ __device__ static constexpr int first_line(int output) { return output * kPeriod; }
  __host__ __device__ static constexpr int line(int m, int k) { return m * kPeriod + k * kStep; }
  __host__ __device__ static constexpr int phase_of(int) { return 0; }
  __host__ __device__ static constexpr int slot_of(int k) { return k; }

  __device__ static void places(int (&at)[kSlots], int column, int outputs) {
#pragma unroll
    for (int k = 0; k < kKernel; ++k) at[k] = column + place(k * kStep, outputs);
  }
};

}  // namespace rawkern
