// How warps walk a dense tensor whose elements are to be summed per channel.
//
// Memory is viewed as (outer, channels, inner): for NCHW data the images, the channels and the pixels; for
// channels-last data the pixels, the channels and 1. A unit of work belongs to one warp, which leaves its sums in
// `partials`; these are added up in a second kernel (channel_sum.cu), in a fixed order. There are two walks:
//   RowWalk     a unit is a slot (a stretch) of the outer * inner elements of one channel. Neighbouring lanes read
//               neighbouring elements of a row of `inner`. For long rows.
//   ColumnWalk  memory is viewed as a matrix of `width` columns, a multiple of channels * inner, so that a column
//               belongs to one channel. A unit is a strip of columns, one vector per lane, over a slot of rows. For
//               short rows.
// Every element is visited exactly once, so a kernel may also compute something for each element on the way.
#pragma once
#include "value_vector.cuh"

namespace rawkern {

struct ChannelLayout {
  int64 total, channels, inner;
  int64 length;       // RowWalk: elements of a channel; ColumnWalk: rows of the matrix
  int64 slots;        // of the length
  int64 slot_length;  // elements, or rows, of a slot
  int64 width;        // ColumnWalk: columns of the matrix
  int64 vector;       // elements that are read at a time: a power of two, at most 16 bytes
};

// Calls Kernel::run_width<n>(params) for the number n of elements of type T that are read at a time. No generic lambda:
// NVRTC before 13.4 takes those for functions of the host.
template <class Kernel, class T, int kWidth = 16 / int(sizeof(T))>
__device__ inline void run_with_width(const typename Kernel::Params& params) {
  if constexpr (kWidth == 1)
    Kernel::template run_width<1>(params);
  else if (params.layout.vector == kWidth)
    Kernel::template run_width<kWidth>(params);
  else
    run_with_width<Kernel, T, kWidth / 2>(params);
}

// Quotient and remainder of a running number by `divisor`, advanced by a fixed step without dividing anew.
struct Cursor {
  int64 divisor, quotient, remainder, step_quotient, step_remainder;
  __device__ Cursor(int64 start, int64 step, int64 divisor) : divisor(divisor) {
    quotient = start / divisor;
    remainder = start - quotient * divisor;
    step_quotient = step / divisor;
    step_remainder = step - step_quotient * divisor;
  }
  __device__ void advance() {
    quotient += step_quotient;
    remainder += step_remainder;
    if (remainder >= divisor) {
      remainder -= divisor;
      ++quotient;
    }
  }
};

// One lane's part of a unit, kWidth elements at a time:
//   exists       whether the unit exists; the same for all lanes of a warp
//   more()       whether elements are left, starting at offset(); next() goes on
//   channel(i)   of the i-th element of the vectors, for lanes that have elements
//   store(...)   the lane's sums, kWidth for each of kSums quantities, to `partials`; all lanes call it
template <int kWidth>
struct RowWalk {
  static constexpr bool kOneChannel = true;
  const ChannelLayout& layout;
  int64 unit_channel, slot, position, end;
  Cursor cursor;
  bool exists;

  __device__ RowWalk(const ChannelLayout& layout, int64 unit)
      : layout(layout),
        unit_channel(unit / layout.slots),
        slot(unit - unit_channel * layout.slots),
        position(slot * layout.slot_length + int64(threadIdx.x % kWarp) * kWidth),
        cursor(position, kWarp * kWidth, layout.inner) {
    exists = unit_channel < layout.channels;
    end = (slot + 1) * layout.slot_length;
    if (end > layout.length) end = layout.length;
    if (!exists) end = 0;
  }
  __device__ bool more() const { return position < end; }
  __device__ int64 offset() const {
    return (cursor.quotient * layout.channels + unit_channel) * layout.inner + cursor.remainder;
  }
  __device__ void next() {
    position += kWarp * kWidth;
    cursor.advance();
  }
  __device__ int64 channel(int) const { return unit_channel; }

  template <class A, int kSums>
  __device__ void store(double* partials, const A (&sums)[kWidth][kSums]) const {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      double sum = 0;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += double(sums[i][s]);
      for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullMask, sum, distance);
      if (exists && threadIdx.x % kWarp == 0)
        partials[(s * layout.channels + unit_channel) * layout.slots + slot] = sum;
    }
  }
};

template <int kWidth>
struct ColumnWalk {
  static constexpr bool kOneChannel = false;
  const ChannelLayout& layout;
  int64 slot, column, row, end;
  bool exists;

  __device__ ColumnWalk(const ChannelLayout& layout, int64 unit) : layout(layout) {
    int64 strips = ceil_div(layout.width, kWarp * kWidth);
    slot = unit / strips;
    column = (unit - slot * strips) * kWarp * kWidth + int64(threadIdx.x % kWarp) * kWidth;
    row = slot * layout.slot_length;
    end = row + layout.slot_length;
    exists = slot < layout.slots;
    int64 rows_here =
        column < layout.width ? ceil_div(layout.total - column, layout.width) : 0;  // the last row may be short
    if (end > rows_here) end = rows_here;
    if (!exists) end = 0;
  }
  __device__ bool more() const { return row < end; }
  __device__ int64 offset() const { return row * layout.width + column; }
  __device__ void next() { ++row; }
  __device__ int64 channel(int i) const { return (column + i) / layout.inner % layout.channels; }

  template <class A, int kSums>
  __device__ void store(double* partials, const A (&sums)[kWidth][kSums]) const {
    if (!exists || column >= layout.width) return;
#pragma unroll
    for (int s = 0; s < kSums; ++s)
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        partials[(s * layout.slots + slot) * layout.width + column + i] = double(sums[i][s]);
  }
};

// Visits every element of a lane's part: body(values, results, sums, i) gets the kInputs values of an element (the
// i-th of its vector), sets its kOutputs results and adds to its kSums sums. An input that is null counts as zero, an
// output that is null is not stored. kUnroll vectors of each input are under way at once.
template <class T, int kWidth, int kUnroll, int kInputs, int kOutputs, int kSums, class Walk, class Body>
__device__ inline void walk_channels(Walk& walk, const void* const* inputs, void* const* outputs,
                                     Accumulator<T> (&sums)[kWidth][kSums], Body& body) {
  using A = Accumulator<T>;
  using V = ValueVector<T, kWidth>;
  while (walk.more()) {
    int64 offset[kUnroll];
    V loaded[kUnroll][kInputs];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      offset[u] = -1;
      if (!walk.more()) continue;
      offset[u] = walk.offset();
      walk.next();
#pragma unroll
      for (int k = 0; k < kInputs; ++k)
        loaded[u][k] = inputs[k] ? *reinterpret_cast<const V*>(static_cast<const T*>(inputs[k]) + offset[u]) : V{};
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (offset[u] < 0) continue;
      A results[kOutputs > 0 ? kOutputs : 1][kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        A value[kInputs], out[kOutputs > 0 ? kOutputs : 1];
#pragma unroll
        for (int k = 0; k < kInputs; ++k) value[k] = loaded[u][k].get(i);
        body(value, out, sums[i], i);
#pragma unroll
        for (int k = 0; k < kOutputs; ++k) results[k][i] = out[k];
      }
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) {
        if (!outputs[k]) continue;
        V result;
        result.set(results[k]);
        *reinterpret_cast<V*>(static_cast<T*>(outputs[k]) + offset[u]) = result;
      }
    }
  }
}

}  // namespace rawkern
