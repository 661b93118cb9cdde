// How a block brings the rows of an operand of the weight gradient from global memory into a swizzled tile.
//
// A tile has one row of 128 bytes for each channel (of x), or for each pair of a tap and a channel (of gy); along it
// lie the 32 words of a strip of pixels: one TF32 value each, rounded here, or two 16-bit values. Floats that are split
// (kSplit) make two such tiles, of their high parts and, behind it, of their low ones. What does not exist is zero.
// Ways to share the tile out, each with a class for the rows of x (Input) and of gy (GradOutput):
//     AlongPixels    a warp has several rows, a lane a word of each. Any strides.
//     AlongChannels  a lane has a row (two rows of 16-bit values, read as one word, for which channels must be
//                    neighbours in memory), a warp 16 bytes of each.
//     AlongWindows   stride 1, pixels neighbours in memory, whole rows: a warp has several channels, a lane two words
//                    of the window that all taps see, which each tap puts into its own row.
//     AlongThreeTaps, AlongTapsStride2
//                    kernels of width 3 and stride 1, of width 2, 3 or 4 and stride 2, dilation 1, pixels neighbours in
//                    memory: of gy a lane has a word (two, stride 2) of each of the warp's channels, which is loaded
//                    and rounded once for all taps. Of x it has 16 bytes of a row, if rows are whole and begin at
//                    multiples of as many (kWholeRows); else a word of each of the warp's rows (kAnyRows).
// Whole rows are whole strips; of 16-bit values, the width of gy is even and words at even columns are whole in memory.
// Of any rows, which have strips of their own, the last one may end before its 32nd word, and 16-bit values are loaded
// one by one, from the first tap's column on.
// All load into registers now and store later, so that a step's loads have a whole step's time. What costs here is the
// number of instructions: where all that a warp loads exists, it asks once instead of for each element. The rows of
// all taps at once keep their addresses from step to step (begin() forms them where a strip begins); the others find
// them anew from TileRows.
#pragma once
#include "index_space.cuh"
#include "opaque.cuh"
#include "read_only.cuh"
#include "weight_gradient_products.cuh"

namespace rawkern {

enum RowKind { kWholeRows, kAnyRows };

constexpr int kNowhere = -(1 << 30);  // a column that no tap moves into an image

// The pixels of a strip in one tensor: offset from the image row's first pixel of the first image, and column.
template <int kPixels>
struct Strip2d {
  int64 offset[kPixels];
  int column[kPixels];
};

// The rows of a block's tiles: row r is channel r % tap_rows at tap r / tap_rows; `tap_rows` is a multiple of 16. Kept
// in shared memory, where it takes no registers from the products.
template <class T>
struct TileRows {
  const T* base;                                               // of the tile's first channel and tap, in row 0
  int64 channel_stride, row_stride, tap_stride, pixel_stride;  // the last from a pixel of the strip to the next
  int channels, taps;                                          // that there are, from the tile's first
  int height, width;
  int tap_rows, tap_inverse;   // 4096 / tap_rows, rounded up
  int first_column, dilation;  // what the first tap adds to a column of the strip, and how much more the next
  int column_step;             // from a pixel of the strip to the next
  int odd;                     // whether the first tap begins a strip at an odd column

  __device__ int tap(int row) const { return (row / 16 * tap_inverse) >> 8; }

  // What a tap adds to the columns of the strip, in this row of the image.
  __device__ int displacement(int tap, int image_row) const {
    return tap < taps && unsigned(image_row) < unsigned(height) ? first_column + tap * dilation : kNowhere;
  }
  __device__ bool exists(int column) const { return unsigned(column) < unsigned(width); }
  __device__ const T* channel_at(int tap, int channel, int image_row) const {
    return base + tap * tap_stride + channel * channel_stride + image_row * row_stride;
  }
};

// How addresses move, in bytes: from the row of one step to that of the next, and between the rows of a tile that a
// lane has.
struct RowSteps {
  int64 next, apart;
  int height, rows, odd;  // of the image; rows of the image from one step to the next; see TileRows
};

__device__ inline unsigned bits_of(float value) { return __float_as_uint(value); }
__device__ inline unsigned bits_of(Half value) { return value.bits; }
__device__ inline unsigned bits_of(BFloat16 value) { return value.bits; }

template <class T>
struct WordOfPixels {
  static constexpr int kPack = 2;
  __device__ static unsigned make(const unsigned (&bits)[2]) { return bits[0] | bits[1] << 16; }
};
template <>
struct WordOfPixels<float> {
  static constexpr int kPack = 1;
  __device__ static unsigned make(const unsigned (&bits)[1]) { return bits[0]; }
};

// Of words as they were read, the words to stage, by put(words, tile): once, or of a split tile's `kRows` rows twice.
template <class T, bool kSplit, int kRows, int kCount, class Put>
__device__ inline void put_parts(const unsigned (&words)[kCount], unsigned char* tile, Put put) {
  if constexpr (kSplit) {
    float values[kCount];
    unsigned high[kCount], low[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = __uint_as_float(words[i]);
    split_tf32(values, high, low);
    put(high, tile);
    put(low, tile + kRows * kSwizzledRow);
  } else if constexpr (WordOfPixels<T>::kPack == 1) {
    unsigned staged[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) staged[i] = tf32_operand(__uint_as_float(words[i]));
    put(staged, tile);
  } else {
    put(words, tile);
  }
}

// An address that walks in equal steps, counted in bytes, which takes an addition where an index takes two shifts more.
template <class T>
class Address {
 public:
  Address() = default;
  __device__ Address(const T* start, int64 step)
      : at_(reinterpret_cast<uint64>(start)), step_(step * int64(sizeof(T))) {}
  __device__ void advance() { at_ += step_; }
  __device__ unsigned bits() const { return bits_of(read_only(reinterpret_cast<const T*>(at_))); }
  // The word here, or so many words further on.
  __device__ unsigned word(int further = 0) const {
    return read_only(reinterpret_cast<const unsigned*>(at_) + further);
  }

 private:
  uint64 at_;
  int64 step_;
};

// Of so many equal shares, how many a warp takes that takes part: a warp has all of them or none.
__host__ __device__ constexpr int shares_of_warp(int shares, int warps) {
  int each = 1;
  while (each * warps < shares) each *= 2;
  return each;
}

// Rows that find their place anew in every step.
struct NothingKept {
  template <class Rows, class Strip>
  __device__ void begin(const Rows&, int, const Strip&, int) {}
};

template <class T, bool kSplit, int kRows, int kWarps>
struct PixelRows : NothingKept {
  static constexpr int kPack = WordOfPixels<T>::kPack, kEach = shares_of_warp(kRows, kWarps);
  static_assert(kRows % kEach == 0 && (16 % kEach == 0 || kEach % 16 == 0), "a warp's rows belong to one tap");
  unsigned bits[kEach][kPack];

  __device__ void load(const TileRows<T>& rows, int image_row, const Strip2d<32 * kPack>& strip, int warp,
                       const RowSteps&) {
    int lane = threadIdx.x % kWarp, first = opaque(warp) * kEach, tap = rows.tap(first);
    if (first >= kRows) return;
    int channel = first - tap * rows.tap_rows, displacement = rows.displacement(tap, image_row);
    const T* start = rows.channel_at(tap, channel, image_row);
    Address<T> from[kPack];
    int left[kPack];  // channels of this pixel
    bool all = channel + kEach <= rows.channels;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      int pixel = lane * kPack + i;
      bool exists = rows.exists(strip.column[pixel] + displacement);
      left[i] = exists ? rows.channels - channel : 0;
      from[i] = Address<T>(start + strip.offset[pixel], rows.channel_stride);
      all = all && exists;
    }
    if (__all_sync(kFullMask, all)) {
#pragma unroll
      for (int row = 0; row < kEach; ++row) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          bits[row][i] = from[i].bits();
          from[i].advance();
        }
      }
    } else {
#pragma unroll
      for (int row = 0; row < kEach; ++row) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          bits[row][i] = row < left[i] ? from[i].bits() : 0;
          from[i].advance();
        }
      }
    }
  }

  __device__ void store(const TileRows<T>&, unsigned char* tile, int warp, const RowSteps&) const {
    int lane = threadIdx.x % kWarp;
    if (warp * kEach >= kRows) return;
    unsigned words[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) words[i] = WordOfPixels<T>::make(bits[i]);
    put_parts<T, kSplit, kRows>(words, tile, [&](const unsigned (&staged)[kEach], unsigned char* to) {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        *reinterpret_cast<unsigned*>(to + swizzled(warp * kEach + i, lane / 4) + lane % 4 * 4) = staged[i];
    });
  }
};

__device__ inline void put_unit(const unsigned (&words)[4], unsigned char* to) {
  Unit unit;
#pragma unroll
  for (int i = 0; i < 4; ++i) unit.words[i] = words[i];
  *reinterpret_cast<Unit*>(to) = unit;
}

template <class T, bool kSplit, int kRows, int kWarps>
struct ChannelRows : NothingKept {
  static constexpr int kPack = WordOfPixels<T>::kPack, kBlock = kWarp * kPack, kUnits = 8, kRun = 4 * kPack;
  static constexpr int kItems = int(ceil_div(kRows, kBlock)) * kUnits, kEach = shares_of_warp(kItems, kWarps);
  static_assert(kUnits % kEach == 0, "a warp's units are neighbours in the same rows");
  unsigned bits[kEach][kRun];  // of each pixel, kPack channels

  __device__ static int row_of(int item) { return item / kUnits * kBlock + threadIdx.x % kWarp * kPack; }

  __device__ void load(const TileRows<T>& rows, int image_row, const Strip2d<32 * kPack>& strip, int warp,
                       const RowSteps&) {
    constexpr int kLast = kEach * kRun - 1;
    int item = opaque(warp) * kEach, row = row_of(item), first = item % kUnits * kRun;
    if (item >= kItems) return;
    int tap = rows.tap(row), channel = row - tap * rows.tap_rows, displacement = rows.displacement(tap, image_row);
    bool has_row = row < kRows && channel < rows.channels;
    int begin = strip.column[first] + displacement, end = strip.column[first + kLast] + displacement;
    bool one_image = end - begin == kLast * rows.column_step;
    const T* start = rows.channel_at(tap, channel, image_row);
    if (__all_sync(kFullMask, has_row && one_image && rows.exists(begin) && rows.exists(end))) {
      Address<T> from(start + strip.offset[first], rows.pixel_stride);
#pragma unroll
      for (int i = 0; i <= kLast; ++i) {
        bits[i / kRun][i % kRun] = from.word();
        from.advance();
      }
    } else {
#pragma unroll
      for (int i = 0; i <= kLast; ++i) {
        bool exists = has_row && rows.exists(strip.column[first + i] + displacement);
        const T* from = start + strip.offset[first + i];
        bits[i / kRun][i % kRun] = exists ? read_only(reinterpret_cast<const unsigned*>(from)) : 0;
      }
    }
  }

  __device__ void store(const TileRows<T>&, unsigned char* tile, int warp, const RowSteps&) const {
    int later = kPack == 2 ? threadIdx.x / 4 % 2 : 0;  // which of two rows comes second, for the banks' sake
    int item = warp * kEach, row = row_of(item);
    if (item >= kItems || row >= kRows) return;
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      int half = k ^ later;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        unsigned words[4];
#pragma unroll
        for (int word = 0; word < 4; ++word) words[word] = word_at(bits[i], word, half);
        put_parts<T, kSplit, kRows>(words, tile + swizzled(row + half, item % kUnits + i), put_unit);
      }
    }
  }

  // A word of pixels of one channel, from the words of two channels that were read.
  __device__ static unsigned word_at(const unsigned (&read)[kRun], int word, int half) {
    if constexpr (kPack == 1)
      return read[word];
    else
      return __byte_perm(read[2 * word], read[2 * word + 1], half ? 0x7632 : 0x5410);
  }
};

// Rows of x by words of neighbouring pixels: of the warps that take part, each has every eighth row, with one swizzle.
template <class T, bool kSplit, int kRows, int kWarps>
struct WordRows : NothingKept {
  static constexpr int kPack = WordOfPixels<T>::kPack, kSharers = 8, kEach = kRows / kSharers;
  static_assert(kWarps >= kSharers, "every row has its warp");
  unsigned words[kEach];

  __device__ void load(const TileRows<T>& rows, int image_row, const Strip2d<32 * kPack>& strip, int warp,
                       const RowSteps&) {
    int first = opaque(warp), left = rows.channels - first;
    if (first >= kSharers) return;
    const T* start = rows.channel_at(0, first, image_row) + strip.offset[0] + threadIdx.x % kWarp * kPack;
    Address<T> from(start, rows.channel_stride * kSharers);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      words[i] = i * kSharers < left ? from.word() : 0;
      from.advance();
    }
  }

  __device__ void store(const TileRows<T>&, unsigned char* tile, int warp, const RowSteps&) const {
    int lane = threadIdx.x % kWarp;
    if (warp >= kSharers) return;
    tile += swizzled(warp, lane / 4) + lane % 4 * 4;
    put_parts<T, kSplit, kRows>(words, tile, [](const unsigned (&staged)[kEach], unsigned char* to) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) *reinterpret_cast<unsigned*>(to + i * kSharers * kSwizzledRow) = staged[i];
    });
  }
};

// The words that a lane has of a tile's rows, in memory whole or (kHalves) two 16-bit values anywhere. These are put
// together by join() where they are stored: sooner, it would wait for them.
template <class T, bool kHalves>
struct LaneWords {
  static constexpr int kParts = kHalves ? 2 : 1;
  int code;  // four times the channels that have the word, from the warp's first on; a bit for each part that exists

  // Of the word at a column of the image, of so many channels.
  __device__ void find(const TileRows<T>& rows, int column, int channels) {
    code = 4 * channels;
#pragma unroll
    for (int k = 0; k < kParts; ++k) code += rows.exists(column + k) ? 1 << k : 0;
  }
  // In a row of the image, which may not exist.
  __device__ LaneWords in_row(bool exists) const { return LaneWords{exists ? code : 0}; }
  // That of the warp's channel `channel`.
  __device__ void read(unsigned (&parts)[kParts], uint64 from, int channel) const {
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      bool exists = (code & 1 << k) != 0 && code >= 4 * channel + 4;
      if constexpr (kHalves)
        parts[k] = exists ? bits_of(read_only(reinterpret_cast<const T*>(from) + k)) : 0;
      else
        parts[k] = exists ? read_only(reinterpret_cast<const unsigned*>(from)) : 0;
    }
  }
  // Those of the first kEach of the warp's channels, which are `apart` bytes apart.
  template <int kEach, int kWarps, int kCount>
  __device__ void read_each(unsigned (&parts)[kCount][kParts], uint64 from, int64 apart) const {
    apart = opaque(apart);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      read(parts[i], from, i * kWarps);
      from += apart;
    }
  }
};

template <int kCount, int kParts>
__device__ inline void join(const unsigned (&parts)[kCount][kParts], unsigned (&words)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) words[i] = kParts == 2 ? parts[i][0] | parts[i][kParts - 1] << 16 : parts[i][0];
}

// Which pixels of a strip there are, where it may end early: all before the first that is nowhere.
template <RowKind kKind, int kPack>
struct StripEnd {
  int pixels;

  __device__ void find(const Strip2d<32 * kPack>& strip) {
    pixels = 0;
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      pixels += __popc(__ballot_sync(kFullMask, strip.column[threadIdx.x % kWarp * kPack + i] != kNowhere));
  }
  // A word of pixels with zeros for those that do not exist.
  __device__ unsigned cut(unsigned word, int number) const {
    int left = pixels - number * kPack;
    unsigned some = kPack == 2 && left == 1 ? word & 0xffffu : 0u;
    return left >= kPack ? word : some;
  }
};
template <int kPack>
struct StripEnd<kWholeRows, kPack> {
  __device__ void find(const Strip2d<32 * kPack>&) {}
  __device__ unsigned cut(unsigned word, int) const { return word; }
};

// Rows of gy, two taps or more in a tile: of each channel, 64 words (of 16-bit values, from an even column on). A tap
// that is `shift` pixels on sees them from word shift / kPack on, and if there is half a word left, words that
// straddle.
template <class T, bool kSplit, int kRows, int kWarps>
struct WindowRows : NothingKept {
  static constexpr int kPack = WordOfPixels<T>::kPack, kEach = int(ceil_div(kRows / 2, kWarps));
  static_assert(kWarps % 4 == 0, "a warp's channels have one swizzle, or two that differ in its highest bit");
  unsigned words[2 * kEach];

  __device__ static int taps(const TileRows<T>& rows) { return rows.tap(kRows - 1) + 1; }

  __device__ void load(const TileRows<T>& rows, int image_row, const Strip2d<32 * kPack>& strip, int warp,
                       const RowSteps&) {
    int lane = threadIdx.x % kWarp, first = opaque(warp), shift = rows.odd;
    int column = strip.column[0] + rows.first_column - shift + lane * kPack;
    bool row_exists = unsigned(image_row) < unsigned(rows.height), exists = row_exists && rows.exists(column);
    bool has_more =
        row_exists && rows.exists(column + 32 * kPack) && lane * kPack <= shift + (taps(rows) - 1) * rows.dilation;
    int left = exists ? rows.channels - first : 0, more_left = has_more ? rows.channels - first : 0;
    const T* start = rows.channel_at(0, first, image_row) + strip.offset[0] + (lane * kPack - shift);
    Address<T> from(start, rows.channel_stride * kWarps);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      words[2 * i] = i * kWarps < left ? from.word() : 0;
      words[2 * i + 1] = i * kWarps < more_left ? from.word(32) : 0;
      from.advance();
    }
  }

  __device__ void store(const TileRows<T>& rows, unsigned char* tile, int warp, const RowSteps&) const {
    auto put = [&](const unsigned (&staged)[2 * kEach], unsigned char* to) { put_taps(rows, staged, to, warp); };
    put_parts<T, kSplit, kRows>(words, tile + warp * kSwizzledRow, put);
  }

  __device__ static void put_taps(const TileRows<T>& rows, const unsigned (&staged)[2 * kEach], unsigned char* tile,
                                  int warp) {
    int lane = threadIdx.x % kWarp, count = taps(rows), tap_rows = rows.tap_rows, dilation = rows.dilation;
#pragma unroll 1
    for (int tap = 0, shift = rows.odd; tap < count; ++tap, shift += dilation, tile += tap_rows * kSwizzledRow) {
      int distance = shift / kPack, to = (lane - distance) & (kWarp - 1);
      int place = ((to / 4 ^ (warp & 7)) << 4) + to % 4 * 4;
      if (shift % kPack)
        put<true>(staged, distance, tile + place, tile + (place ^ 64), tap_rows - warp);
      else
        put<false>(staged, distance, tile + place, tile + (place ^ 64), tap_rows - warp);
    }
  }

  // This lane's words of one tap, of `left` channels from the warp's first.
  template <bool kStraddles>
  __device__ static void put(const unsigned (&staged)[2 * kEach], int distance, unsigned char* even, unsigned char* odd,
                             int left) {
    int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      unsigned here = staged[2 * i], further = staged[2 * i + 1], word = lane < distance ? further : here;
      if constexpr (kStraddles)
        word = word >> 16 | __shfl_sync(kFullMask, lane <= distance ? further : here, lane + 1) << 16;
      unsigned char* to = (i * kWarps & 4 ? odd : even) + i * kWarps * kSwizzledRow;
      if (i * kWarps < left) *reinterpret_cast<unsigned*>(to) = word;
    }
  }
};

// Rows of x that begin anywhere and may end within the strip: a warp has every kWarps-th, a lane a word of each.
template <class T, bool kSplit, int kRows, int kWarps>
struct LaneRows {
  static constexpr int kPack = WordOfPixels<T>::kPack, kEach = int(ceil_div(kRows, kWarps));
  static_assert(kWarps % 4 == 0, "a warp's rows have one swizzle, or two that differ in its highest bit");
  using Words = LaneWords<T, kPack == 2>;
  unsigned parts[kEach][Words::kParts];
  uint64 at;
  Words own;

  __device__ void begin(const TileRows<T>& rows, int image_row, const Strip2d<32 * kPack>& strip, int warp) {
    int first = opaque(warp), pixel = opaque(int(threadIdx.x)) % kWarp * kPack;
    own.find(rows, strip.column[0] + pixel, rows.channels - first);
    at = reinterpret_cast<uint64>(rows.channel_at(0, first, image_row) + strip.offset[0] + pixel);
  }

  __device__ void load(const TileRows<T>&, int, const Strip2d<32 * kPack>&, int, const RowSteps& steps) {
    own.template read_each<kEach, kWarps>(parts, at, steps.apart);
    at += steps.next;
  }

  __device__ void store(const TileRows<T>&, unsigned char* tile, int warp, const RowSteps&) const {
    unsigned words[kEach];
    join(parts, words);
    int lane = threadIdx.x % kWarp, place = warp * kSwizzledRow + ((lane / 4 ^ (warp & 7)) << 4) + lane % 4 * 4;
    put_parts<T, kSplit, kRows>(words, tile, [&](const unsigned (&staged)[kEach], unsigned char* to) {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (i * kWarps + warp < kRows)
          *reinterpret_cast<unsigned*>(to + (i * kWarps & 4 ? place ^ 64 : place) + i * kWarps * kSwizzledRow) =
              staged[i];
    });
  }
};

// Rows of x, 16 bytes at a time: of the last eight warps each takes four rows of every 32, a lane the same unit of
// each.
template <class T, bool kSplit, int kRows, int kWarps>
struct UnitRows {
  static constexpr int kSharers = 8, kApart = kSharers * 4, kEach = kRows / kApart, kFirst = kWarps - kSharers;
  static_assert(kFirst >= 0 && kRows % kApart == 0, "every row has its warp");
  Words<unsigned, 4> units[kEach];
  uint64 at;        // the lane's unit of its first row
  int left, place;  // rows that exist from there on; where that unit goes in the tile

  __device__ void begin(const TileRows<T>& rows, int image_row, const Strip2d<32 * WordOfPixels<T>::kPack>& strip,
                        int warp) {
    int lane = opaque(int(threadIdx.x)) % kWarp, row = (opaque(warp) - kFirst) * 4 + lane / 8, unit = lane % 8;
    left = rows.channels - row;
    place = swizzled(row, unit);
    if (warp < kFirst) return;
    at = reinterpret_cast<uint64>(rows.channel_at(0, row, image_row) + strip.offset[0]) + unit * 16;
  }

  __device__ void load(const TileRows<T>&, int, const Strip2d<32 * WordOfPixels<T>::kPack>&, int warp,
                       const RowSteps& steps) {
    if (warp < kFirst) return;
    uint64 from = at;
    int64 apart = opaque(steps.apart);  // in registers, or every row's address begins with a load
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      units[i] = Words<unsigned, 4>{};
      if (i * kApart < left) read_only_unit(reinterpret_cast<const void*>(from), units[i].at);
      from += apart;
    }
    at += steps.next;
  }

  __device__ void store(const TileRows<T>&, unsigned char* tile, int warp, const RowSteps&) const {
    if (warp < kFirst) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      put_parts<T, kSplit, kRows>(units[i].at, tile + place + i * kApart * kSwizzledRow, put_unit);
  }
};

// Rows of gy at three neighbouring taps. Of each channel of the warp a lane has one word of the strip as the first tap
// sees it (of 16-bit values, from an even column on); `more` are words from the strip's last one on, of all channels,
// four lanes for each. A tap that is `shift` pixels on sees the words shift / kPack further on, and if there is half a
// word left, words that straddle, of which the last needs the first of `more`'s.
template <RowKind kKind, class T, bool kSplit, int kRows, int kWarps>
struct ThreeTapRows {
  static constexpr int kPack = WordOfPixels<T>::kPack, kTaps = 3, kChannels = kRows / kTaps, kMore = 4;
  static constexpr int kEach = int(ceil_div(kChannels, kWarps)), kTapBytes = kChannels * kSwizzledRow;
  static constexpr bool kHalves = kKind == kAnyRows && kPack == 2;
  static_assert(kWarps % 4 == 0, "a warp's channels have one swizzle, or two that differ in its highest bit");
  static_assert(kEach * kMore <= kWarp, "the warp's lanes suffice for what is beyond the strip");
  using Words = LaneWords<T, kHalves>;
  unsigned parts[kEach + 1][Words::kParts];  // the last: of `more`
  uint64 at, more_at;
  Words own, more;  // `more`: one channel or none
  int more_place;   // where its word goes, and in the two lowest bits, how many words after the strip's last (3: none)
  StripEnd<kKind, kPack> end;

  __device__ void begin(const TileRows<T>& rows, int image_row, const Strip2d<32 * kPack>& strip, int warp) {
    int lane = opaque(int(threadIdx.x)) % kWarp, first = opaque(warp), channel = first + lane / kMore * kWarps;
    int odd = kHalves ? 0 : rows.odd, column = strip.column[0] - odd;
    int later = lane % kMore;
    own.find(rows, column + lane * kPack, rows.channels - first);
    more.find(rows, column + (kWarp - 1 + later) * kPack, later < kMore - 1 && channel < rows.channels);
    const T* start = rows.base + image_row * rows.row_stride + (strip.offset[0] - odd);
    at = reinterpret_cast<uint64>(start + first * rows.channel_stride + lane * kPack);
    more_at = reinterpret_cast<uint64>(start + channel * rows.channel_stride + (kWarp - 1 + later) * kPack);
    more_place = swizzled(channel, 7) + (3 + later) * 4 + (channel < kChannels ? later : kMore - 1);
    end.find(strip);
  }

  __device__ void load(const TileRows<T>&, int image_row, const Strip2d<32 * kPack>&, int, const RowSteps& steps) {
    bool row_exists = unsigned(image_row) < unsigned(steps.height);
    own.in_row(row_exists).template read_each<kEach, kWarps>(parts, at, steps.apart);
    more.in_row(row_exists).read(parts[kEach], more_at, 0);
    at += steps.next;
    more_at += steps.next;
  }

  __device__ void store(const TileRows<T>&, unsigned char* tile, int warp, const RowSteps& steps) const {
    unsigned words[kEach + 1];
    join(parts, words);
    put_parts<T, kSplit, kRows>(words, tile, [&](const unsigned (&staged)[kEach + 1], unsigned char* to) {
      if (kPack == 2 && !kHalves && steps.odd)
        put<kPack - 1>(staged, to, warp);
      else
        put<0>(staged, to, warp);
    });
  }

  template <int kOdd>
  __device__ void put(const unsigned (&whole)[kEach + 1], unsigned char* tile, int warp) const {
    constexpr int kLast = kChannels - (kEach - 1) * kWarps;  // warps that have the last of their rows
    int lane = threadIdx.x % kWarp, swizzle = warp & 7;
    bool has_last = kLast >= kWarps || opaque(warp) < kLast;
    unsigned straddling[kEach + 1];
#pragma unroll
    for (int i = 0; kPack == 2 && i <= kEach; ++i)
      straddling[i] = __byte_perm(whole[i], __shfl_sync(kFullMask, whole[i], lane + 1), 0x5432);
    // All lanes store, which takes fewer instructions; where one has no word of this tap, `more`'s come after it.
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      int distance = (kOdd + tap) / kPack, to = (lane - distance) & (kWarp - 1);
      int place = warp * kSwizzledRow + ((to / 4 ^ swizzle) << 4) + to % 4 * 4;
      unsigned char *even = tile + place, *odd_row = tile + (place ^ 64);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        unsigned char* row = (i * kWarps & 4 ? odd_row : even) + i * kWarps * kSwizzledRow + tap * kTapBytes;
        unsigned word = (kOdd + tap) % kPack ? straddling[i] : whole[i];
        if (i < kEach - 1 || has_last) *reinterpret_cast<unsigned*>(row) = end.cut(word, to);
      }
    }
    __syncwarp();
    int later = more_place % kMore, more_to = more_place - later;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      int distance = (kOdd + tap) / kPack;
      bool straddles = (kOdd + tap) % kPack != 0;
      if (later <= distance && (straddles || later > 0))
        *reinterpret_cast<unsigned*>(tile + more_to + tap * kTapBytes - distance * 4) =
            end.cut(straddles ? straddling[kEach] : whole[kEach], kWarp - 1 + later - distance);
    }
  }
};

// Rows of gy at kTaps neighbouring taps, stride 2. The word of pixel p at tap t is number 2 p + t: a lane has two words
// of each channel, which the first two taps take, and the next taps take the next lane's. Of 16-bit values, a word of
// pixels is made of halves of two neighbouring such words. What the last lane needs of the next one, `more`, lanes have
// for each channel, kMore of them.
template <RowKind kKind, class T, bool kSplit, int kRows, int kWarps, int kTaps>
struct TapStride2Rows {
  static constexpr int kPack = WordOfPixels<T>::kPack, kChannels = kRows / kTaps;
  static constexpr int kEach = int(ceil_div(kChannels, kWarps)), kTapBytes = kChannels * kSwizzledRow;
  static constexpr int kSeen = kPack == 2 ? kTaps / 2 + 2 : kTaps, kMore = kSeen - 2;  // words, by a lane's taps
  static constexpr int kWords = 2 * kEach + (kMore > 0);
  static_assert(kWarps % 4 == 0, "a warp's channels have one swizzle, or two that differ in its highest bit");
  static constexpr bool kHalves = kKind == kAnyRows && kPack == 2;
  static_assert(kTaps >= 2 && kMore <= 2 && kEach * kMore <= kWarp, "a lane's words and the next lane's suffice");
  using Words = LaneWords<T, kHalves>;
  unsigned parts[kWords][Words::kParts];  // the last: of `more`
  uint64 at, more_at;
  Words own[2], more;  // `more`: one channel or none
  StripEnd<kKind, kPack> end;

  __device__ void begin(const TileRows<T>& rows, int image_row, const Strip2d<32 * kPack>& strip, int warp) {
    constexpr int kLanes = kMore > 0 ? kMore : 1;  // of `more`, for a channel
    int lane = opaque(int(threadIdx.x)) % kWarp, first = opaque(warp), channel = first + lane / kLanes * kWarps;
    int odd = kHalves ? 0 : rows.odd, column = strip.column[0] - odd, beyond = (2 * kWarp + lane % kLanes) * kPack;
#pragma unroll
    for (int k = 0; k < 2; ++k) own[k].find(rows, column + (lane * 2 + k) * kPack, rows.channels - first);
    more.find(rows, column + beyond, lane < kEach * kMore && channel < rows.channels);
    const T* start = rows.base + image_row * rows.row_stride + (strip.offset[0] - odd);
    at = reinterpret_cast<uint64>(start + first * rows.channel_stride + lane * 2 * kPack);
    more_at = reinterpret_cast<uint64>(start + channel * rows.channel_stride + beyond);
    end.find(strip);
  }

  __device__ void load(const TileRows<T>&, int image_row, const Strip2d<32 * kPack>&, int, const RowSteps& steps) {
    bool row_exists = unsigned(image_row) < unsigned(steps.height);
    Words here[2] = {own[0].in_row(row_exists), own[1].in_row(row_exists)};
    uint64 from = at;
    int64 apart = opaque(steps.apart);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int k = 0; k < 2; ++k) here[k].read(parts[2 * i + k], from + k * sizeof(unsigned), i * kWarps);
      from += apart;
    }
    if constexpr (kMore > 0) more.in_row(row_exists).read(parts[kWords - 1], more_at, 0);
    at += steps.next;
    more_at += steps.next;
  }

  __device__ void store(const TileRows<T>&, unsigned char* tile, int warp, const RowSteps& steps) const {
    unsigned words[kWords];
    join(parts, words);
    put_parts<T, kSplit, kRows>(words, tile, [&](const unsigned (&staged)[kWords], unsigned char* to) {
      if (kPack == 2 && !kHalves && steps.odd)
        put<kPack - 1>(staged, to, warp);
      else
        put<0>(staged, to, warp);
    });
  }

  template <int kOdd>
  __device__ void put(const unsigned (&staged)[kWords], unsigned char* tile, int warp) const {
    constexpr int kLast = kChannels - (kEach - 1) * kWarps;  // warps that have the last of their rows
    int lane = threadIdx.x % kWarp, place = warp * kSwizzledRow + ((lane / 4 ^ (warp & 7)) << 4) + lane % 4 * 4;
    bool has_last = kLast >= kWarps || opaque(warp) < kLast;
    unsigned char *even = tile + place, *odd_row = tile + (place ^ 64);
    unsigned seen[kEach][kSeen];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {  // all before the first store, so that they do not wait for each other
      seen[i][0] = staged[2 * i], seen[i][1] = staged[2 * i + 1];
#pragma unroll
      for (int k = 0; k < kMore; ++k) {
        unsigned next = __shfl_sync(kFullMask, staged[2 * i + k], lane + 1);
        unsigned last = __shfl_sync(kFullMask, staged[kWords - 1], i * kMore + k);
        seen[i][2 + k] = lane == kWarp - 1 ? last : next;
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      unsigned char* row = (i * kWarps & 4 ? odd_row : even) + i * kWarps * kSwizzledRow;
      if (i == kEach - 1 && !has_last) continue;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        int first = (tap + kOdd) / kPack;  // word of the lane, or half of which it takes with the half of the next
        unsigned word = seen[i][first];
        if constexpr (kPack == 2) word = __byte_perm(word, seen[i][first + 1], (tap + kOdd) % 2 ? 0x7632 : 0x5410);
        *reinterpret_cast<unsigned*>(row + tap * kTapBytes) = end.cut(word, lane);
      }
    }
  }
};

constexpr int kLine = 128;  // bytes of the L2 cache

// Requests a row of the image, for the strip, one channel of a tile for each index: at three pixels, between which
// there is no other line unless the stride is large.
struct ChannelRequests {
  template <class T, int kPixels>
  __device__ static void request(const TileRows<T>& rows, int image_row, const Strip2d<kPixels>& strip, int index) {
    if (index >= rows.channels) return;
    int displacement = rows.displacement(0, image_row);
    const T* start = rows.channel_at(0, index, image_row);
#pragma unroll 1
    for (int pixel = 0; pixel < kPixels; pixel += pixel == 0 ? kPixels / 2 : kPixels / 2 - 1)
      if (rows.exists(strip.column[pixel] + displacement)) prefetch_line(start + strip.offset[pixel]);
  }
};

// The same, one pixel of the strip for each index, where channels are neighbours.
struct PixelRequests {
  template <class T, int kPixels>
  __device__ static void request(const TileRows<T>& rows, int image_row, const Strip2d<kPixels>& strip, int index) {
    if (index >= kPixels || !rows.exists(strip.column[index] + rows.displacement(0, image_row))) return;
    const T* start = rows.channel_at(0, 0, image_row) + strip.offset[index];
    for (int channel = 0; channel < rows.channels; channel += kLine / int(sizeof(T))) prefetch_line(start + channel);
  }
};

// Requests the next step's rows. The last threads do, who load least.
template <class Kind, class T, int kRows, int kThreads>
struct Requests {
  template <class Strip>
  __device__ void begin(const TileRows<T>&, const TileRows<T>&, int, int, const Strip (&)[2], const RowSteps (&)[2]) {}

  // From now on, `left` rows of x and of gy are still to be loaded, the next ones `row` and `out_row`.
  template <class Strip>
  __device__ void next(const TileRows<T>& x, const TileRows<T>& y, int row, int out_row, const Strip (&strip)[2],
                       const int (&left)[2], const RowSteps (&)[2]) {
    int index = kThreads - 1 - opaque(int(threadIdx.x));
    if (index < kRows) {
      if (left[0] > 0) Kind::request(x, row, strip[0], index);
    } else if (left[1] > 0) {
      Kind::request(y, out_row, strip[1], index - kRows);
    }
  }
};

// Requests the rows of the next step but one, where pixels are neighbours: a thread has one of the lines on which a
// channel's words lie (of gy, kGradOutputLines), and goes from row to row with it.
template <int kGradOutputLines, class T, int kRows, int kThreads>
struct LineRequests {
  static constexpr int kAhead = 2, kInputThreads = 2 * kRows, kPixels = kWarp * WordOfPixels<T>::kPack;
  static_assert(kInputThreads % kWarp == 0 && kThreads >= kInputThreads + 64 * kGradOutputLines, "a thread for each");
  uint64 line;

  __device__ static bool for_input() { return int(threadIdx.x) < kInputThreads; }

  template <class Strip>
  __device__ void begin(const TileRows<T>& x, const TileRows<T>& y, int row, int out_row, const Strip (&strip)[2],
                        const RowSteps (&steps)[2]) {
    int thread = opaque(int(threadIdx.x)), of_y = thread < kInputThreads ? 0 : 1;
    int index = thread - of_y * kInputThreads, lines = of_y ? kGradOutputLines : 2, channel = index / lines;
    const TileRows<T>& rows = of_y ? y : x;
    int first = strip[of_y].column[0], length = of_y ? (kPixels - 1) * y.column_step + 2 : kPixels - 1;
    int column = minimum_of(first + length * (index % lines) / (lines - 1), rows.width - 1);
    if (column < 0) column = 0;
    channel = minimum_of(channel, rows.channels - 1);  // those that there are not ask for the last one's, too
    const T* at = rows.channel_at(0, channel, of_y ? out_row : row) + strip[of_y].offset[0] + (column - first);
    line = reinterpret_cast<uint64>(at) + kAhead * (of_y ? steps[1].next : steps[0].next);
  }

  template <class Strip>
  __device__ void next(const TileRows<T>&, const TileRows<T>&, int, int out_row, const Strip (&)[2],
                       const int (&left)[2], const RowSteps (&steps)[2]) {
    int row = out_row + (kAhead - 1) * steps[1].rows;
    bool follows = for_input() ? left[0] >= kAhead : left[1] >= kAhead && unsigned(row) < unsigned(steps[1].height);
    if (follows) prefetch_line(reinterpret_cast<const void*>(line));
    line += for_input() ? steps[0].next : steps[1].next;
  }
};

// A way to share out a tile.
template <template <class, bool, int, int> class InputRows, template <class, bool, int, int> class GradOutputRows,
          class Kind>
struct Sharing {
  template <class T, bool kSplit, int kRows, int kWarps>
  using Input = InputRows<T, kSplit, kRows, kWarps>;
  template <class T, bool kSplit, int kRows, int kWarps>
  using GradOutput = GradOutputRows<T, kSplit, kRows, kWarps>;
  template <class T, int kRows, int kThreads>
  using Requests = rawkern::Requests<Kind, T, kRows, kThreads>;
};
struct AlongPixels : Sharing<PixelRows, PixelRows, ChannelRequests> {};
struct AlongChannels : Sharing<ChannelRows, ChannelRows, PixelRequests> {};
struct AlongWindows : Sharing<WordRows, WindowRows, ChannelRequests> {};

// How rows of x are staged beside those of gy by all taps at once.
template <RowKind kKind, class T, bool kSplit, int kRows, int kWarps>
struct InputOf {
  using type = UnitRows<T, kSplit, kRows, kWarps>;
};
template <class T, bool kSplit, int kRows, int kWarps>
struct InputOf<kAnyRows, T, kSplit, kRows, kWarps> {
  using type = LaneRows<T, kSplit, kRows, kWarps>;
};

template <RowKind kKind>
struct AlongThreeTaps {
  template <class T, bool kSplit, int kRows, int kWarps>
  using Input = typename InputOf<kKind, T, kSplit, kRows, kWarps>::type;
  template <class T, bool kSplit, int kRows, int kWarps>
  using GradOutput = ThreeTapRows<kKind, T, kSplit, kRows, kWarps>;
  template <class T, int kRows, int kThreads>
  using Requests = LineRequests<2, T, kRows, kThreads>;
};

// With three taps there are threads enough for a line each.
template <int kTaps, class T, int kRows, int kThreads>
struct TapStride2Requests : Requests<ChannelRequests, T, kRows, kThreads> {};
template <class T, int kRows, int kThreads>
struct TapStride2Requests<3, T, kRows, kThreads> : LineRequests<4, T, kRows, kThreads> {};

template <RowKind kKind, int kTaps>
struct AlongTapsStride2 {
  template <class T, bool kSplit, int kRows, int kWarps>
  using Input = typename InputOf<kKind, T, kSplit, kRows, kWarps>::type;
  template <class T, bool kSplit, int kRows, int kWarps>
  using GradOutput = TapStride2Rows<kKind, T, kSplit, kRows, kWarps, kTaps>;
  template <class T, int kRows, int kThreads>
  using Requests = TapStride2Requests<kTaps, T, kRows, kThreads>;
};

}  // namespace rawkern
