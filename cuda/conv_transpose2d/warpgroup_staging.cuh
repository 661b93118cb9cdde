// The input's way into shared memory for warpgroup_gather.cuh: one swizzled row of 128 bytes per pixel (a slab of 32
// TF32 or 64 16-bit channels), zeros for pixels outside the image and channels beyond the last.
//
// A stager warp has its scheduler nearly to itself, so nothing hides its latencies: loops load everything before they
// use anything, positions are carried along instead of divided out, and what concerns a whole slab is decided once.
#pragma once
#include "async_copy.cuh"
#include "warpgroup_tile.cuh"
#include "wgmma.cuh"

namespace rawkern {

// Pixels of a stage in the order in which the input's rows are read: `span` of a row, staged_rows rows, and this for
// each plane of rows (there are in_step[0] of them, and of columns in_step[1]).
struct StagedPixels {
  const WarpgroupParams& p;
  Divisor span, staged_rows, step;

  __device__ explicit StagedPixels(const WarpgroupParams& p)
      : p(p), span(p.pitch * p.in_step[1]), staged_rows(p.staged_rows), step(p.in_step[1]) {}

  __device__ int count() const { return p.in_step[0] * p.staged_rows * span.divisor; }

  // Where pixel `index` goes in the stage.
  __device__ int place(int index) const {
    if (p.in_step[0] * p.in_step[1] == 1) return index;
    int x, row, plane_w, y = span.divide(index, x), plane_h = staged_rows.divide(y, row);
    int column = step.divide(x, plane_w);
    return ((plane_h * p.in_step[1] + plane_w) * p.staged_rows + row) * p.pitch + column;
  }
};

// A lane's way through these pixels, a fixed number at a time.
struct PixelWalk : StagedPixels {
  int first, by, first_x, first_y, by_x, by_y;
  int index, x, y;

  __device__ PixelWalk(const WarpgroupParams& p, int first, int by) : StagedPixels(p), first(first), by(by) {
    first_y = span.divide(first, first_x);
    by_y = span.divide(by, by_x);
    restart();
  }
  __device__ void restart() {
    index = first;
    x = first_x;
    y = first_y;
  }
  __device__ void advance() {
    index += by;
    x += by_x;
    y += by_y;
    if (x >= span.divisor) {
      x -= span.divisor;
      ++y;
    }
  }

  // Channel 0 of the pixel, in elements, and its column in the image; false if its row is outside.
  __device__ bool locate(const TilePlace& tile, int64& source, int& column) const {
    int row = y, plane_h = 0, image, at_row;
    if (p.in_step[0] != 1) plane_h = staged_rows.divide(y, row);
    tile.locate(p, row, image, at_row);
    int h = p.in_step[0] * at_row + plane_h + p.in_origin[0];
    column = p.in_step[1] * tile.column + x + p.in_origin[1];
    source = image * p.in_strides[0] + h * p.in_strides[2] + column * p.in_strides[3];
    return image < p.batch && unsigned(h) < unsigned(p.in_size[0]) && plane_h < p.in_step[0];
  }
};

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T values[kCount];
};

// Channels of 32 pixels as they lie in memory, row by row. The second half of 16-bit ones is shifted to other banks.
template <class T>
struct alignas(16) RawRows {
  static constexpr int kSlab = kSwizzledRow / sizeof(T), kHalf = 32;
  T at[kSlab * kWarp + (kSlab > kHalf ? 32 : 0)];
  __device__ T* row(int channel) { return at + channel * kWarp + (channel >= kHalf ? 32 : 0); }
  __device__ const T* row(int channel) const { return at + channel * kWarp + (channel >= kHalf ? 32 : 0); }
};

// Channels apart, pixels neighbours (NCHW, and any other strides), first half of the way: asynchronous copies of
// kVector pixels each bring a batch of 32 pixels, slab after slab as `Slabs` has them, past the registers. The host
// sees to it that copies are aligned, and that their pixels are all inside or all outside the image.
template <class T, int kVector, class Slabs>
struct PixelSource {
  using Raw = RawRows<T>;
  static constexpr int kSlab = kSwizzledRow / sizeof(T), kUnit = 16 / sizeof(T);
  static constexpr int kLanes = kWarp / kVector;  // along the pixels; the others along the channels

  Slabs slabs;
  PixelWalk walk;
  const T* base;  // the slab's first channel of those this lane copies
  int channels;   // from there on

  __device__ PixelSource(const WarpgroupParams& p, int warp, int warps)
      : slabs(p), walk(p, warp * kWarp + pixel(), warps * kWarp) {
    enter_slab();
  }

  __device__ static int pixel() { return threadIdx.x % kWarp % kLanes * kVector; }
  __device__ static int channel() { return threadIdx.x % kWarp / kLanes; }

  __device__ void enter_slab() {
    const WarpgroupParams& p = walk.p;
    base = static_cast<const T*>(p.input) + (slabs.first_channel() + channel()) * p.in_strides[1];
    channels = slabs.channels() - channel();
  }

  // Begins to copy the next batch. When there are no more, the tile lies below the last image, and zeros are written.
  __device__ void start(RawRows<T>& raw) {
    const WarpgroupParams& p = walk.p;
    int64 offset;
    int column;
    bool inside = walk.locate(slabs.at, offset, column) && unsigned(column) < unsigned(p.in_size[1]);
    if (slabs.channels() >= kSlab)
      copy<true>(raw, base + offset, inside);
    else
      copy<false>(raw, base + offset, inside);
    walk.advance();
    if (walk.index - pixel() < walk.count()) return;
    walk.restart();
    slabs.advance();
    enter_slab();
  }

  // kWhole: all channels of the slab exist.
  template <bool kWhole>
  __device__ void copy(RawRows<T>& raw, const T* source, bool inside) const {
    const int64 step = kVector * walk.p.in_strides[1];
    const int multiplied = slabs.stage_units() * kUnit;
    if constexpr (kVector * sizeof(T) >= 4) {
#pragma unroll
      for (int c = 0; c < kSlab; c += kVector) {
        if (!kWhole && c >= multiplied) break;
        // The bank shift depends on c alone: a copy's channels lie in one half.
        T* to = raw.row(c) + channel() * kWarp + pixel();
        async_copy_or_zero(reinterpret_cast<Vector<T, kVector>*>(to),
                           reinterpret_cast<const Vector<T, kVector>*>(source), inside && (kWhole || c < channels));
        source += step;
      }
    } else {  // two bytes: through registers, many at a time
      constexpr int kTogether = 16;
      static_assert(kVector == 1, "larger vectors are copied asynchronously");
#pragma unroll
      for (int first = 0; first < kSlab; first += kTogether) {
        if (!kWhole && first >= multiplied) break;
        T values[kTogether];
#pragma unroll
        for (int c = 0; c < kTogether; ++c) {
          values[c] = inside && (kWhole || first + c < channels) ? *source : T{};
          source += step;
        }
#pragma unroll
        for (int c = 0; c < kTogether; ++c) raw.row(first + c)[pixel()] = values[c];
      }
    }
  }
};

// The second half: lanes read the channels of their pixels, round, and write 16 bytes of a pixel's channels at a time.
template <class T>
struct PixelTurner : StagedPixels {
  static constexpr int kSlab = kSwizzledRow / sizeof(T), kUnit = 16 / sizeof(T), kUnits = kSlab / kUnit;
  using Raw = RawRows<T>;

  __device__ explicit PixelTurner(const WarpgroupParams& p) : StagedPixels(p) {}

  // Units beyond `units` are not multiplied.
  __device__ void turn(const Raw& raw, unsigned char* stage, int batch, int units) const {
    if (units == kUnits)
      turn_units<kUnits>(raw, stage, batch, 0, T{});
    else
#pragma unroll 1
      for (int unit = 0; unit < units; unit += 2) turn_units<2>(raw, stage, batch, unit, T{});
  }

  // float: a lane has one pixel.
  template <int kCount>
  __device__ void turn_units(const Raw& raw, unsigned char* stage, int batch, int first, float) const {
    int lane = threadIdx.x % kWarp, index = batch + lane, to = place(index);
    const float* source = raw.row(first * kUnit) + lane;
    unsigned words[kCount][4];
#pragma unroll
    for (int unit = 0; unit < kCount; ++unit)
#pragma unroll
      for (int i = 0; i < 4; ++i) words[unit][i] = __float_as_uint(source[(unit * kUnit + i) * kWarp]);
#pragma unroll
    for (int unit = 0; unit < kCount; ++unit)
#pragma unroll
      for (int i = 0; i < 4; ++i) words[unit][i] = tf32_operand(__uint_as_float(words[unit][i]));
    if (index >= count()) return;
#pragma unroll
    for (int unit = 0; unit < kCount; ++unit)
      unit_at(stage, to, first + unit) = Unit{{words[unit][0], words[unit][1], words[unit][2], words[unit][3]}};
  }

  // 16 bits: a lane has two neighbouring pixels and half of the units. Of eight lanes that store together, four begin
  // with the one pixel and four with the other, so that they meet all banks.
  template <int kCount, class Element>
  __device__ void turn_units(const Raw& raw, unsigned char* stage, int batch, int first, Element) const {
    int lane = threadIdx.x % kWarp, half = lane / 16, pixel = lane % 16 * 2, index = batch + pixel;
    bool swap = lane / 4 % 2;
    int to[2] = {place(index + swap), place(index + !swap)};
    first += half * (kCount / 2);
    const T* source = raw.row(first * kUnit) + pixel;  // the lane's channels lie in one half
    unsigned words[kCount / 2][2][4];
#pragma unroll
    for (int unit = 0; unit < kCount / 2; ++unit)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
          words[unit][odd][i] = *reinterpret_cast<const unsigned*>(source + (unit * kUnit + 2 * i + odd) * kWarp);
#pragma unroll
    for (int unit = 0; unit < kCount / 2; ++unit)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned even = words[unit][0][i], odd = words[unit][1][i];
        words[unit][0][i] = __byte_perm(even, odd, swap ? 0x7632 : 0x5410);
        words[unit][1][i] = __byte_perm(even, odd, swap ? 0x5410 : 0x7632);
      }
    if (index >= count()) return;
#pragma unroll
    for (int unit = 0; unit < kCount / 2; ++unit)
#pragma unroll
      for (int one = 0; one < 2; ++one) {
        const unsigned (&from)[4] = words[unit][one];
        unit_at(stage, to[one], first + unit) = Unit{{from[0], from[1], from[2], from[3]}};
      }
  }
};

// The two halves for 16-bit elements whose rows begin anywhere (an odd width, say), which nothing could copy two pixels
// at a time: each channel's 32 pixels are copied with what surrounds them, as five aligned units of 16 bytes, and found
// again by how far they are shifted. What does not belong to the image is told apart at the turn. All 32 pixels of a
// batch lie in one row; the input begins at a multiple of 16 bytes.
template <class T>
struct alignas(16) ShiftedRows {
  static constexpr int kSlab = kSwizzledRow / sizeof(T), kUnit = 16 / sizeof(T), kLength = kWarp + kUnit;
  T at[kSlab][kLength];
  int shift, begin, end;  // of the first channel, in elements; the pixels that exist
};

template <class T, class Slabs>
struct ShiftedSource {
  using Raw = ShiftedRows<T>;
  static constexpr int kUnits = kWarp / Raw::kUnit;  // of a row, but for the last
  static constexpr int kChannels = kWarp / kUnits;   // that a warp copies together
  static_assert(kChannels % Raw::kUnit == 0, "channels a lane copies are shifted alike");

  Slabs slabs;
  PixelWalk walk;
  const T* base;  // the slab's first channel

  __device__ ShiftedSource(const WarpgroupParams& p, int warp, int warps)
      : slabs(p), walk(p, warp * kWarp, warps * kWarp) {
    enter_slab();
  }

  __device__ void enter_slab() {
    base = static_cast<const T*>(walk.p.input) + slabs.first_channel() * walk.p.in_strides[1];
  }

  // As PixelSource's.
  __device__ void start(Raw& raw) {
    int64 offset;
    int column, width = walk.p.in_size[1];
    bool inside = walk.locate(slabs.at, offset, column) && column < width && column > -kWarp;
    uint64 row = reinterpret_cast<uint64>(base + offset);
    if (threadIdx.x % kWarp == 0) {
      raw.shift = int(row % 16 / sizeof(T));
      raw.begin = column < 0 ? -column : 0;
      raw.end = inside ? width - column : 0;
    }
    if (inside) copy(raw, row);
    walk.advance();
    if (walk.index < walk.count()) return;
    walk.restart();
    slabs.advance();
    enter_slab();
  }

  __device__ void copy(Raw& raw, uint64 row) const {
    int64 step = walk.p.in_strides[1] * int64(sizeof(T));
    uint64 input = reinterpret_cast<uint64>(walk.p.input), end = input + walk.p.in_bytes;
    bool whole = slabs.channels() >= Raw::kSlab && row / 16 * 16 >= input &&
                 row + (Raw::kSlab - 1) * step + sizeof(raw.at[0]) <= end;
    if (whole)
      copy_rows(raw, row, step, [](uint64, int) { return 16; });
    else
      copy_rows(raw, row, step, [&](uint64 unit, int channel) {
        int64 left = unit < input || channel >= slabs.channels() ? 0 : int64(end - unit);
        return left < 0 ? 0 : left < 16 ? int(left) : 16;
      });
  }

  // bytes_of(address, channel): how much of a unit can be read.
  template <class Bytes>
  __device__ static void copy_rows(Raw& raw, uint64 row, int64 step, Bytes bytes_of) {
    int lane = threadIdx.x % kWarp, channel = lane / kUnits, unit = lane % kUnits;
    uint64 first = (row + channel * step) / 16 * 16 + unit * 16, last = (row + lane * step) / 16 * 16 + kUnits * 16;
#pragma unroll
    for (int c = 0; c < Raw::kSlab; c += kChannels)
      async_copy_part(&raw.at[c + channel][unit * Raw::kUnit], reinterpret_cast<const void*>(first + c * step),
                      bytes_of(first + c * step, c + channel));
#pragma unroll
    for (int c = 0; c < Raw::kSlab; c += kWarp)
      async_copy_part(&raw.at[c + lane][kWarp], reinterpret_cast<const void*>(last + c * step),
                      bytes_of(last + c * step, c + lane));
  }
};

template <class T>
struct ShiftedTurner : StagedPixels {
  using Raw = ShiftedRows<T>;
  static constexpr int kUnit = Raw::kUnit, kUnits = Raw::kSlab / kUnit;

  __device__ explicit ShiftedTurner(const WarpgroupParams& p) : StagedPixels(p) {}

  // A lane has one pixel.
  __device__ void turn(const Raw& raw, unsigned char* stage, int batch, int units) const {
    int lane = threadIdx.x % kWarp, index = batch + lane, to = place(index);
    bool exists = lane >= raw.begin && lane < raw.end;
    int column[kUnit];  // of the pixel, for channels that follow each other
#pragma unroll
    for (int c = 0; c < kUnit; ++c) column[c] = lane + (int(raw.shift + c * p.in_strides[1]) & (kUnit - 1));
    if (units == kUnits) {
#pragma unroll
      for (int first = 0; first < kUnits; first += kUnits / 2)
        turn_units<kUnits / 2>(raw, stage, index, to, first, exists, column);
    } else {
#pragma unroll 1
      for (int first = 0; first < units; first += 2) turn_units<2>(raw, stage, index, to, first, exists, column);
    }
  }

  template <int kCount>
  __device__ void turn_units(const Raw& raw, unsigned char* stage, int index, int to, int first, bool exists,
                             const int (&column)[kUnit]) const {
    unsigned bits[kCount][kUnit];
#pragma unroll
    for (int unit = 0; unit < kCount; ++unit)
#pragma unroll
      for (int c = 0; c < kUnit; ++c) bits[unit][c] = raw.at[(first + unit) * kUnit + c][column[c]].bits;
    Unit values[kCount];
#pragma unroll
    for (int unit = 0; unit < kCount; ++unit)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[unit].words[i] = exists ? bits[unit][2 * i] | bits[unit][2 * i + 1] << 16 : 0u;
    if (index >= count()) return;
#pragma unroll
    for (int unit = 0; unit < kCount; ++unit) unit_at(stage, to, first + unit) = values[unit];
  }
};

// Channels neighbours, in units of 16 bytes: they are copied to where they belong, and float is rounded there. A warp
// takes 16 pixels at a time: eight lanes have the units of a pixel, and each lane four pixels in a row.
template <class T>
struct ChannelStager {
  static constexpr int kUnit = 16 / sizeof(T), kBlock = 4, kPixels = kWarp / 8 * kBlock;

  PixelWalk walk;
  int units = 0, units_before = 0;  // of the slab copied last, and of the one before

  __device__ ChannelStager(const WarpgroupParams& p, int warp, int warps)
      : walk(p, warp * kPixels + threadIdx.x % kWarp / 8 * kBlock, warps * kPixels) {}

  __device__ static int unit() { return threadIdx.x % 8; }

  // Where the four pixels from the walk's on go.
  __device__ void places(int (&to)[kBlock]) const {
#pragma unroll
    for (int e = 0; e < kBlock; ++e) to[e] = walk.place(walk.index + e);
  }

  // Begins to copy a slab, which `Slabs` is at.
  template <class Slabs>
  __device__ void copy(unsigned char* stage, const Slabs& slabs) {
    const WarpgroupParams& p = walk.p;
    units_before = units;
    units = slabs.stage_units();
    bool exists = unit() * kUnit < slabs.channels();
    const T* base = static_cast<const T*>(p.input) + slabs.first_channel() + unit() * kUnit;
    if (unit() < units)
#pragma unroll 1
      for (; walk.index < walk.count(); walk.advance()) {
        int64 offset;
        int column, to[kBlock];
        bool inside = walk.locate(slabs.at, offset, column) && exists;
        places(to);
        const T* source = base + offset;
#pragma unroll
        for (int e = 0; e < kBlock; ++e) {
          async_copy_or_zero(&unit_at(stage, to[e], unit()), reinterpret_cast<const Unit*>(source),
                             inside && unsigned(column + e) < unsigned(p.in_size[1]));
          source += p.in_strides[3];
        }
      }
    walk.restart();
  }

  // Rounds a slab that has arrived: the one copied last, or the one before.
  __device__ void round(unsigned char* stage, bool before) {
    if (sizeof(T) != 4) return;
    if (unit() < (before ? units_before : units))
#pragma unroll 1
      for (; walk.index < walk.count(); walk.advance()) {
        int to[kBlock];
        places(to);
        Unit values[kBlock];
#pragma unroll
        for (int e = 0; e < kBlock; ++e) values[e] = unit_at(stage, to[e], unit());
#pragma unroll
        for (int e = 0; e < kBlock; ++e)
#pragma unroll
          for (int i = 0; i < 4; ++i) values[e].words[i] = tf32_operand(__uint_as_float(values[e].words[i]));
#pragma unroll
        for (int e = 0; e < kBlock; ++e) unit_at(stage, to[e], unit()) = values[e];
      }
    walk.restart();
  }
};

}  // namespace rawkern
