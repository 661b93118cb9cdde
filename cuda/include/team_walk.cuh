// How threads walk the rows of a tensor (N, C, *): a row is one channel of one image, `spatial` elements long.
//
// A row is cut into slots, and one team of `lanes` neighbouring threads (a power of two, at most a warp) walks a slot,
// so that few long rows fill the machine as well as many short ones. In contiguous memory a row is one piece, and the
// lanes of a team read neighbouring elements, 16 bytes a lane where `vector` says that all arrays begin at a multiple
// of that; rows may begin anywhere, and what lies before the first and after the last multiple goes element by element.
// In channels-last memory the elements of a row lie `channels` apart and neighbouring rows are neighbours in memory, so
// the teams of a warp are interleaved: neighbouring threads walk neighbouring rows.
//
// A walk hands over batches of several loads per array, so that enough loads are under way at once.
#pragma once
#include "quotient.cuh"

namespace rawkern {

struct Rows {
  int64 rows;
  int64 spatial;      // elements of a row
  int64 slots;        // of a row
  int64 slot_length;  // elements of a slot
  int64 channels;
  int lanes;
  int channels_last;
  int vector;
  int unused;  // fills the struct up to a multiple of 8 bytes
};

// One thread's part of a slot.
struct Stretch {
  int64 row, slot;
  int64 image, channel;  // of the row
  int64 begin, end;      // positions in the row: begin + (its place in the team), ... below end
  int64 origin, step;    // element p of the row is at origin + p * step
  int place;             // in the team
  int team_stride;       // distance in lanes between members of a team
  bool exists;           // whether there is such a row

  template <int kThreads>
  __device__ static Stretch of_thread(const Rows& rows) {
    Stretch s;
    int lane = threadIdx.x % kWarp, teams = kWarp / rows.lanes;
    int64 warp = linear_block() * (kThreads / kWarp) + threadIdx.x / kWarp;
    int64 bundle = quotient(warp, rows.slots);
    s.slot = warp - bundle * rows.slots;
    s.place = rows.channels_last ? lane / teams : lane % rows.lanes;
    s.team_stride = rows.channels_last ? teams : 1;
    s.row = bundle * teams + (rows.channels_last ? lane % teams : lane / rows.lanes);
    s.exists = s.row < rows.rows;
    s.image = quotient(s.row, rows.channels);
    s.channel = s.row - s.image * rows.channels;
    s.step = rows.channels_last ? rows.channels : 1;
    s.origin = rows.channels_last ? s.image * rows.channels * rows.spatial + s.channel : s.row * rows.spatial;
    s.begin = s.slot * rows.slot_length;
    s.end = s.begin + rows.slot_length;
    if (s.end > rows.spatial) s.end = rows.spatial;
    if (!s.exists) s.end = s.begin;
    return s;
  }

  // Sum over the team, in the same order every time; every member gets it. All threads of the warp must call.
  template <class A>
  __device__ A team_sum(const Rows& rows, A value) const {
    for (int distance = rows.lanes / 2; distance > 0; distance /= 2)
      value += __shfl_xor_sync(kFullMask, value, distance * team_stride);
    return value;
  }
};

// kLoads packs of kWidth values from each of kInputs arrays; the first `valid` packs exist.
template <class T, int kWidth_, int kLoads_, int kInputs>
struct Batch {
  static constexpr int kWidth = kWidth_, kLoads = kLoads_;
  Packed<T, kWidth> input[kInputs][kLoads];
  int64 offset, stride;  // of the first pack, and from pack to pack
  int valid;

  __device__ Accumulator<T> get(int array, int load, int i) const {
    return to_accumulator(input[array][load].value[i]);
  }
  __device__ void store(T* output, int load, const Packed<T, kWidth>& pack) const {
    *reinterpret_cast<Packed<T, kWidth>*>(output + offset + load * stride) = pack;
  }
};

// The positions from `begin` to `end`, packs of kWidth of them at a time.
template <class T, int kWidth, int kLoads, int kInputs, class Body>
__device__ inline void walk_packs(const Rows& rows, const Stretch& s, int64 begin, int64 end,
                                  const T* const (&input)[kInputs], Body& body) {
  int64 stride = int64(rows.lanes) * kWidth;
  for (int64 p = begin + s.place * kWidth; p < end; p += kLoads * stride) {
    Batch<T, kWidth, kLoads, kInputs> batch;
    batch.offset = s.origin + p * s.step;
    batch.stride = stride * s.step;
    int64 left = ceil_div(end - p, stride);
    batch.valid = left < kLoads ? int(left) : kLoads;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      if (load >= batch.valid) continue;
#pragma unroll
      for (int array = 0; array < kInputs; ++array)
        batch.input[array][load] =
            *reinterpret_cast<const Packed<T, kWidth>*>(input[array] + batch.offset + load * batch.stride);
    }
    body(batch);
  }
}

// The first `head` and the last `tail` positions, together less than two packs.
template <class T, int kInputs, class Body>
__device__ inline void walk_edges(const Rows& rows, const Stretch& s, int head, int tail,
                                  const T* const (&input)[kInputs], Body& body) {
  for (int i = s.place; i < head + tail; i += rows.lanes) {
    Batch<T, 1, 1, kInputs> batch;
    batch.offset = s.origin + (i < head ? s.begin + i : s.end - tail + (i - head));
    batch.stride = 0;
    batch.valid = 1;
#pragma unroll
    for (int array = 0; array < kInputs; ++array) batch.input[array][0].value[0] = input[array][batch.offset];
    body(batch);
  }
}

// Calls body(batch) for all of the thread's elements; kBytes of every array are under way at once where it is aligned.
template <int kBytes, class T, int kInputs, class Body>
__device__ inline void walk(const Rows& rows, const Stretch& s, const T* const (&input)[kInputs], Body&& body) {
  constexpr int kWidth = 16 / sizeof(T);
  if (!rows.vector) return walk_packs<T, 1, kBytes / 8>(rows, s, s.begin, s.end, input, body);
  int length = int(s.end - s.begin), head = -int(s.origin + s.begin) & kWidth - 1;
  if (head > length) head = length;
  int tail = (length - head) % kWidth;
  if (head + tail > 0) walk_edges(rows, s, head, tail, input, body);
  walk_packs<T, kWidth, kBytes / 16>(rows, s, s.begin + head, s.end - tail, input, body);
}

}  // namespace rawkern
