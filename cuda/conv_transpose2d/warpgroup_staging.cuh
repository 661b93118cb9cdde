// The input's way into shared memory for warpgroup_gather.cuh: one swizzled row of 128 bytes per pixel (a slab of 32
// TF32 or 64 16-bit channels), zeros for pixels outside the image and channels beyond the last.
//
// A stager warp has its scheduler nearly to itself, so nothing hides its latencies: loops load everything before they
// use anything, and positions are carried along instead of divided out.
#pragma once
#include "async_copy.cuh"
#include "load_matrices.cuh"
#include "opaque.cuh"
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

// 64 channels of 32 16-bit pixels, row by row as they lie in memory, in units of 16 bytes. Where a unit is found
// depends on the channel, so that the rows that load_matrices_transposed() reads together lie in different banks.
template <class T>
struct alignas(128) RawRows {
  static constexpr int kSlab = kSwizzledRow / sizeof(T), kUnit = 16 / sizeof(T), kRowUnits = kWarp / kUnit;
  T at[kSlab * kWarp];
  __device__ static int place(int channel, int unit) {
    return channel * kWarp + (unit ^ channel / kUnit % kRowUnits) * kUnit;
  }
};
template <>
struct RawRows<float> {};  // goes another way

// 16-bit types with channels apart and pixels neighbours (NCHW), first half of the way: asynchronous copies of p.vector
// pixels each, 2, 4 or 8, bring a batch of 32 pixels, slab after slab as `Slabs` has them, past the registers. The host
// sees to it that copies are aligned, and that their pixels are all inside or all outside the image.
template <class T, class Slabs>
struct PixelSource {
  static constexpr int kSlab = kSwizzledRow / sizeof(T), kUnit = 16 / sizeof(T), kLeast = 4 / sizeof(T);

  Slabs slabs;
  int vector, pixel, channel;  // of the batch and slab, that this lane copies first
  PixelWalk walk;
  const T* base;  // the slab's channel of that number
  int channels;   // from there on

  // What is opaque stays in a register: to look it up again takes longer than what it is needed for.
  __device__ PixelSource(const WarpgroupParams& p, int warp, int warps)
      : slabs(p),
        vector(opaque(p.vector)),
        pixel(opaque(int(threadIdx.x % kWarp * p.vector % kWarp))),
        channel(opaque(int(threadIdx.x % kWarp * p.vector / kWarp))),
        walk(p, warp * kWarp + pixel, warps * kWarp) {
    enter_slab();
  }

  __device__ void enter_slab() {
    const WarpgroupParams& p = walk.p;
    base = static_cast<const T*>(p.input) + (slabs.first_channel() + channel) * p.in_strides[1];
    channels = slabs.channels() - channel;
  }

  // Begins to copy the next batch. When there are no more, the tile lies below the last image, and zeros are written.
  __device__ void start(RawRows<T>& raw) {
    const WarpgroupParams& p = walk.p;
    int64 offset;
    int column;
    bool inside = walk.locate(slabs.at, offset, column) && unsigned(column) < unsigned(p.in_size[1]);
    if (vector == kLeast)
      copy<kLeast>(raw, base + offset, inside);
    else if (vector == 2 * kLeast)
      copy<2 * kLeast>(raw, base + offset, inside);
    else
      copy<4 * kLeast>(raw, base + offset, inside);
    walk.advance();
    if (walk.index - pixel < walk.count()) return;
    walk.restart();
    slabs.advance();
    enter_slab();
  }

  template <int kVector>
  __device__ void copy(RawRows<T>& raw, const T* source, bool inside) const {
    if (slabs.channels() >= kSlab)
      copy<kVector, true>(raw, source, inside);
    else
      copy<kVector, false>(raw, source, inside);
  }

  // kWhole: all channels of the slab exist.
  template <int kVector, bool kWhole>
  __device__ void copy(RawRows<T>& raw, const T* source, bool inside) const {
    const int64 step = kVector * walk.p.in_strides[1];
    T* to = raw.at + channel * kWarp + pixel % kUnit;
#pragma unroll
    for (int c = 0; c < kSlab; c += kVector) {
      // A copy's channels share a unit, so c alone says where theirs are found.
      async_copy_or_zero(reinterpret_cast<Vector<T, kVector>*>(to + RawRows<T>::place(c, pixel / kUnit)),
                         reinterpret_cast<const Vector<T, kVector>*>(source), inside && (kWhole || c < channels));
      source += step;
    }
  }
};

// The second half: the batch is read by load_matrices_transposed(), which hands every lane eight channels of a pixel,
// as they belong together in the stage: one unit of 16 bytes.
template <class T>
struct PixelTurner : StagedPixels {
  static constexpr int kUnits = kSwizzledRow / 16;

  int lane;

  __device__ explicit PixelTurner(const WarpgroupParams& p) : StagedPixels(p), lane(opaque(int(threadIdx.x % kWarp))) {}

  // Where a batch's pixels go in the stage: one after the other, or as each lane knows of its own pixel, -1 for none.
  enum class Places { kInOrder, kKnown, kSome };

  // Units beyond `units` are not multiplied.
  __device__ void turn(const RawRows<T>& raw, unsigned char* stage, int batch, int units) const {
    if (batch + kWarp > count())
      turn<Places::kSome>(raw, stage, batch + lane < count() ? place(batch + lane) : -1, units);
    else if (p.in_step[0] * p.in_step[1] > 1)
      turn<Places::kKnown>(raw, stage, place(batch + lane), units);
    else
      turn<Places::kInOrder>(raw, stage + batch * kSwizzledRow, 0, units);
  }

  // A lane's units: of pixel `pixel` and every eighth from there. In order they are found without computing, since the
  // swizzle repeats itself every eight pixels.
  template <Places kPlaces>
  struct Target {
    unsigned char* stage;
    int own, pixel, unit;
    unsigned char* first;

    __device__ Target(unsigned char* stage, int own, int pixel, int unit)
        : stage(stage),
          own(own),
          pixel(pixel),
          unit(unit),
          first(reinterpret_cast<unsigned char*>(&unit_at(stage, pixel, unit))) {}
    // Number `i` of them.
    __device__ void store(int i, const Unit& values) const {
      if constexpr (kPlaces == Places::kInOrder) {
        *reinterpret_cast<Unit*>(first + i * (8 * kSwizzledRow)) = values;
      } else {
        int to = __shfl_sync(kFullMask, own, pixel + i * 8);
        if (kPlaces == Places::kKnown || to >= 0) unit_at(stage, to, unit) = values;
      }
    }
  };

  // Matrix j has channels 8 u + 2 j and 8 u + 2 j + 1 of unit u in two of its rows, and eight pixels.
  template <Places kPlaces>
  __device__ void turn(const RawRows<T>& raw, unsigned char* stage, int own, int units) const {
    constexpr int kGroups = kWarp / 8, kTogether = kUnits / 2;
    int channel = lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2;
#pragma unroll
    for (int first = 0; first < kUnits; first += kTogether) {
      if (first >= units) break;
      Target<kPlaces> target(stage, own, lane / 4, first + lane % 4);
      unsigned words[kGroups][4];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) load_matrices_transposed(words[g], raw.at + raw.place(first * 8 + channel, g));
#pragma unroll
      for (int g = 0; g < kGroups; ++g) target.store(g, Unit{{words[g][0], words[g][1], words[g][2], words[g][3]}});
    }
  }
};

// Channels apart, everything else: float, and 16-bit pixels that nothing could copy two at a time (rows that begin
// anywhere, strides). A lane takes the channels of its pixel 32 at a time, in two groups of 16: it loads a group,
// rounds it and stores 16 bytes at once. While one group is stored the other one is under way, and then the same group
// of the next 32 channels or pixels, which may belong to the next slab or tile. Measured against the way through shared
// memory this is as fast in float or faster: there the tensor cores leave least of the bandwidth of shared memory.
template <class T, class Slabs>
struct SinglePixels {
  static constexpr int kUnit = 16 / sizeof(T), kGroup = 16, kGroupUnits = kGroup / kUnit, kTurnUnits = 2 * kGroupUnits;

  Slabs slabs;  // of what is loaded next
  PixelWalk walk;
  int unit;            // its first, in the slab
  const char* source;  // its first channel, of this lane's pixel
  int64 channel_step;  // bytes
  bool inside;
  T group[2][kGroup];

  __device__ SinglePixels(const WarpgroupParams& p, int warp, int warps)
      : slabs(p),
        walk(p, warp * kWarp + threadIdx.x % kWarp, warps * kWarp),
        channel_step(p.in_strides[1] * int64(sizeof(T))) {
    locate();
    load(group[0], 0);
    load(group[1], 1);
  }

  // Finds the pixels that the walk is at. When there are no more, the tile lies below the last image, and all are
  // zeros.
  __device__ void locate() {
    const WarpgroupParams& p = walk.p;
    int64 offset;
    int column;
    inside = walk.locate(slabs.at, offset, column) && unsigned(column) < unsigned(p.in_size[1]);
    source = static_cast<const char*>(p.input) + offset * int64(sizeof(T)) + slabs.first_channel() * channel_step;
    unit = 0;
  }

  __device__ void advance() {
    unit += kTurnUnits;
    if (unit < slabs.stage_units()) return;
    walk.advance();
    if (walk.index - int(threadIdx.x % kWarp) >= walk.count()) {
      walk.restart();
      slabs.advance();
    }
    locate();
  }

  // Group `which` of the two, of the 32 channels that are next.
  __device__ void load(T (&values)[kGroup], int which) {
    int left = slabs.channels() - unit * kUnit - which * kGroup;
    if (left >= kGroup)
      load<true>(values, left);
    else
      load<false>(values, left);
  }
  template <bool kWhole>
  __device__ void load(T (&values)[kGroup], int left) {
#pragma unroll
    for (int c = 0; c < kGroup; ++c) {
      values[c] = inside && (kWhole || c < left) ? *reinterpret_cast<const T*>(source) : T{};
      source += opaque(channel_step);  // a sum, not a product
    }
  }

  // Stages this warp's pixels of a slab, of which the first `units` units are multiplied.
  __device__ void stage(unsigned char* to, int units) {
#pragma unroll 1
    for (int index = walk.first; index - int(threadIdx.x % kWarp) < walk.count(); index += walk.by) {
      int place = index < walk.count() ? walk.place(index) : -1;
#pragma unroll 1
      for (int first = 0; first < units; first += kTurnUnits) {
        advance();
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          if (place >= 0) store(group[which], to, place, first + which * kGroupUnits);
          load(group[which], which);
        }
      }
    }
  }

  __device__ static void store(const T (&values)[kGroup], unsigned char* to, int place, int first) {
#pragma unroll
    for (int u = 0; u < kGroupUnits; ++u) unit_at(to, place, first + u) = unit_of(&values[u * kUnit]);
  }
  __device__ static Unit unit_of(const float* values) {
    Unit unit;
#pragma unroll
    for (int i = 0; i < 4; ++i) unit.words[i] = tf32_operand(values[i]);
    return unit;
  }
  template <class Element>
  __device__ static Unit unit_of(const Element* values) {
    Unit unit;
#pragma unroll
    for (int i = 0; i < 4; ++i) unit.words[i] = unsigned(values[2 * i].bits) | unsigned(values[2 * i + 1].bits) << 16;
    return unit;
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
