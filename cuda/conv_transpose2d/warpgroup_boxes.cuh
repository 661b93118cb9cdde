// The input's way into shared memory for warpgroup_gather.cuh where the copy engine brings it (tensor_copy.cuh): one
// swizzled row of 128 bytes per pixel (a slab of 32 TF32, 64 16-bit or 16 split channels), zeros for pixels outside the
// image and channels beyond the last. The engine rounds float on its way, unless stagers are to split it.
//
//   channels neighbours (NHWC)   memory --engine--> stage [pixel][128 B, swizzled]
//   the same, to be split        memory --engine--> box [32 pixels][channel] --stager warp--> stage
//   pixels neighbours (NCHW)     memory --engine--> box [channel][32 pixels] --stager warp--> stage
//
// Each stager warp has a small ring of boxes, most of them under way; it waits for one, reads it with its lanes along
// the pixels, writes it with 16 bytes of channels per lane (float) or as transposed matrices (16-bit types), both
// without bank conflicts, and has the engine fill it again. It issues some 100 instructions for 32 pixels of a slab
// (twice as many for 16-bit rows that begin anywhere, which are read value by value, and for floats that it splits),
// and nothing in them waits for memory. What limits it is shared memory itself, which the tensor cores use most of: 96
// of its cycles for each box, against 80 of 128 that the products want.
#pragma once
#include "load_matrices.cuh"
#include "opaque.cuh"
#include "warpgroup_tile.cuh"
#include "wgmma.cuh"

namespace rawkern {

// Rows of pixels of a slab, over all planes of rows: where row `y` of them lies in the tile and in the input.
struct StagedRow {
  int row, plane_h;  // of the tile

  __device__ StagedRow(const WarpgroupParams& p, int y)
      : row(y), plane_h(p.in_step[0] == 1 ? 0 : Divisor(p.staged_rows).divide(y, row)) {}
  // The image and its row (which may lie outside).
  __device__ void locate(const WarpgroupParams& p, const TilePlace& tile, int& image, int& h) const {
    int at_row;
    tile.locate(p, row, image, at_row);
    h = p.in_step[0] * at_row + plane_h + p.in_origin[0];
  }
};

// The boxes that a stager warp takes of a slab, row after row: every so many of them, on from slab to slab, so that the
// warps' shares even out.
struct BoxWalk {
  int span, stride, rows, by;  // pixels of a row, and those that its boxes are for
  int y, first;                // of the box: its row and its first pixel there

  // What is opaque stays in a register.
  __device__ BoxWalk(const WarpgroupParams& p, int segment, int warp, int warps)
      : span(opaque(p.span)),
        stride(opaque((p.span + segment - 1) / segment * segment)),
        rows(opaque(p.in_step[0] * p.staged_rows)),
        by(warps * segment),
        y(0),
        first(warp * segment) {
    carry();
  }
  __device__ void carry() {
#pragma unroll 1
    for (; first >= span; ++y) first -= stride;
  }
  __device__ void advance() {
    first += by;
    carry();
  }
  __device__ bool in_slab() const { return y < rows; }
  __device__ void next_slab() { y -= rows; }
};

// A box: kSegment pixels of a row, and of each all channels of a slab, [channel][pixel]. The engine copies from
// multiples of 16 bytes only, while a tile begins anywhere; so the box begins up to kAlign - 1 pixels before the first
// one that is wanted, and has kAlign more. (They also keep the channels of a 16-bit matrix in different banks.) Where
// rows, too, begin anywhere (kFlat), it is copied in kAlign parts, each of every kAlign-th channel: what begins at such
// a multiple in one channel need not do so in the next, but does so in the kAlign-th.
//
// Of channels-last memory (kChannels) a box is [pixel][channel]; only what is to be split comes this way.
template <class T, bool kSplit, Staging kStaging>
struct Box {
  static constexpr bool kFlat = kStaging == kStageFlat, kChannels = kStaging == kStageChannels;
  static constexpr int kSegment = 32, kSlab = OperandRow<T, kSplit>::kChannels, kAlign = 16 / sizeof(T);
  static constexpr int kMore = kFlat && kSplit ? 2 * kAlign : kAlign;  // twice, lest parts of few channels be unaligned
  static constexpr int kPixels = kSegment + (kChannels ? 0 : kMore);
  static constexpr int kPart = kSlab / kAlign * kPixels * sizeof(T);  // bytes
  static_assert(!kFlat || kPart % 128 == 0, "the copy engine's destinations are aligned");
  // Channel `channel`, counted in values.
  __device__ static constexpr int place(int channel) {
    return (kFlat ? channel % kAlign * (kSlab / kAlign) + channel / kAlign : channel) * kPixels;
  }
};

// What a stager warp must know of a box that it turns around: the element at which its wanted pixels begin, of the row,
// or where the copy engine does not know rows, of the tensor; and then the column in the image, too, -kNowhere if the
// row lies outside.
struct BoxPlace {
  static constexpr int kNowhere = 1 << 30;
  int column, element;
};

// First half of the way in NCHW, or of what is to be split: the boxes of the rows that a warp takes, slab after slab as
// `Slabs` has them. The copy engine rounds float that is not to be split. It sets to zero what is outside of the image
// or the group, but, where it sees the tensor as one long row, only what is outside of the tensor.
template <class OwnBox, class Slabs>
struct BoxSource {
  static constexpr bool kFlat = OwnBox::kFlat;

  const WarpgroupParams& p;
  Slabs slabs;
  BoxWalk walk;
  int bytes, at[kTensorAxes];  // of a box (opaque); and where the next one is in the tensor
  BoxPlace place;
  bool exists;

  __device__ BoxSource(const WarpgroupParams& p, int warp, int warps)
      : p(p), slabs(p), walk(p, OwnBox::kSegment, warp, warps), bytes(opaque(p.box_bytes)) {
    acquire_tensor_map(p.map);
    enter();
  }
  __device__ void enter() {
#pragma unroll 1
    for (; !walk.in_slab() && slabs.exists(); walk.next_slab()) slabs.advance();
    int image, h, x = p.in_step[1] * slabs.at.column + p.in_origin[1] + walk.first;
    StagedRow(p, walk.y).locate(p, slabs.at, image, h);
    if constexpr (kFlat) {
      bool outside = image >= p.batch || unsigned(h) >= unsigned(p.in_size[0]);
      place.column = outside ? -BoxPlace::kNowhere : x;
      place.element = outside ? 0 : int(image * p.in_strides[0] + h * p.in_strides[2]) + x;
      at[1] = slabs.channel() / OwnBox::kAlign;
      at[2] = slabs.group();
      at[3] = at[4] = 0;
    } else {
      constexpr int kFirst = OwnBox::kChannels ? 2 : 0, kSecond = 2 - kFirst;  // pixels and channels
      place.element = x;
      at[kFirst] = OwnBox::kChannels ? x : x & -OwnBox::kAlign;
      at[kFirst + 1] = h;
      at[kSecond] = slabs.channel();
      at[kSecond + 1] = slabs.group();
      at[4] = image;
    }
    exists = slabs.exists();
  }

  // Begins to copy the next box, if there is one.
  __device__ void start(unsigned char* box, BoxPlace& box_place, Mbarrier& full) {
    if (!exists) return;
    if (elect_lane()) {
      mbarrier_arrive_expect(full, bytes);
      copy(box, full);
      if constexpr (!OwnBox::kChannels) box_place = place;
    }
    if constexpr (!OwnBox::kChannels) __syncwarp();
    walk.advance();
    enter();
  }
  __device__ void copy(unsigned char* box, Mbarrier& full) {
    if constexpr (kFlat) {
#pragma unroll
      for (int part = 0; part < OwnBox::kAlign; ++part) {
        at[0] = (place.element + part * int(p.in_strides[1])) & -OwnBox::kAlign;
        tensor_copy(box + part * OwnBox::kPart, p.map, at, full);
      }
    } else {
      tensor_copy(box, p.map, at, full);
    }
  }
};

// The second half: a box is turned around into the stage, where a pixel's channels are neighbours. Lanes write pixels,
// or words of them, that lie in different banks.
template <class T, bool kSplit, Staging kStaging>
struct BoxTurner {
  using OwnBox = Box<T, kSplit, kStaging>;
  using Row = OperandRow<T, kSplit>;
  static constexpr bool kFlat = OwnBox::kFlat;
  static constexpr int kUnits = Row::kUnits, kUnitValues = Row::kUnitValues;

  const WarpgroupParams& p;
  int lane;

  __device__ explicit BoxTurner(const WarpgroupParams& p) : p(p), lane(opaque(int(threadIdx.x % kWarp))) {}

  // The box that the walk is at. Units beyond `units` are not multiplied.
  __device__ void turn(const unsigned char* box, const BoxPlace& box_place, unsigned char* stage, const BoxWalk& walk,
                       int units) const {
    const T* from = reinterpret_cast<const T*>(box);
    int first = walk.first, width = walk.span - first;  // a multiple of 8
    if (p.in_step[0] * p.in_step[1] == 1) {
      int to = walk.y * p.pitch + first;
      turn_box(from, box_place, width, stage, units, [=](int pixel) { return to + pixel; });
    } else {
      StagedRow at(p, walk.y);
      int steps = p.in_step[1], pitch = p.pitch, rows = p.staged_rows;
      Divisor step(steps);
      turn_box(from, box_place, width, stage, units, [=](int pixel) {
        int plane_w, column = step.divide(first + pixel, plane_w);
        return ((at.plane_h * steps + plane_w) * rows + at.row) * pitch + column;
      });
    }
  }

  template <class Place>
  __device__ void turn_box(const T* box, const BoxPlace& box_place, int width, unsigned char* stage, int units,
                           Place place) const {
    if constexpr (OwnBox::kChannels)
      split_pixels(box, width, stage, place);
    else if constexpr (kFlat || sizeof(T) == 4)
      turn_pixels(box, box_place, width, stage, units, place);
    else
      turn_matrices(box, box_place, width, stage, units, place);
  }

  // A lane takes a pixel.
  template <class Place>
  __device__ void turn_pixels(const T* box, const BoxPlace& box_place, int width, unsigned char* stage, int units,
                              Place place) const {
    if (lane >= width) return;
    int to = place(lane);
    const T* channel[OwnBox::kAlign];  // of a unit
#pragma unroll
    for (int i = 0; i < OwnBox::kAlign; ++i) {
      int begin = box_place.element + (kFlat ? i * int(p.in_strides[1]) : 0);
      channel[i] = box + OwnBox::place(i) + lane + (begin & (OwnBox::kAlign - 1));
    }
    bool inside = !kFlat || unsigned(box_place.column + lane) < unsigned(p.in_size[1]);
    constexpr int kTogether = sizeof(T) == 4 ? kUnits : 2;
    if (units % kTogether == 0)
      for (int unit = 0; unit < units; unit += kTogether) turn_units<kTogether>(channel, stage, to, unit, inside);
    else
      for (int unit = 0; unit < units; unit += 2) turn_units<2>(channel, stage, to, unit, inside);
  }
  template <int kCount>
  __device__ static void turn_units(const T* const (&channel)[OwnBox::kAlign], unsigned char* stage, int to, int first,
                                    bool inside) {
    T values[kCount][kUnitValues];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int c = 0; c < kUnitValues; ++c) values[i][c] = channel[c][OwnBox::place((first + i) * kUnitValues)];
    if (!inside) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int c = 0; c < kUnitValues; ++c) values[i][c] = T{};
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) Row::template store<true>(stage, to, first + i, values[i]);  // by the copy engine
  }

  // Matrix j is unit j of four, and eight pixels: a lane gets two channels of a pixel, a word of each unit. Two times
  // eight pixels are read before they are written; of units that are not multiplied, whatever is there. Of the box's
  // first and last eight pixels some may not be wanted.
  template <class Place>
  __device__ void turn_matrices(const T* box, const BoxPlace& box_place, int width, unsigned char* stage, int units,
                                Place place) const {
    constexpr int kTogether = 2;
    const T* row = box + OwnBox::place(lane);  // of the 32 channels of four units, one
    int skipped = box_place.element & (OwnBox::kAlign - 1),
        wanted = width < OwnBox::kSegment ? width : OwnBox::kSegment;
    int end = skipped + wanted;
#pragma unroll
    for (int first = 0; first < OwnBox::kPixels; first += 8 * kTogether) {
      if (first >= end) break;
      unsigned words[kTogether][kUnits / 4][4];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
#pragma unroll
        for (int half = 0; half < kUnits / 4; ++half)
          if (4 * half < units && (first + 8 * i < OwnBox::kPixels))
            load_matrices_transposed(words[i][half], row + OwnBox::place(half * 32) + first + 8 * i);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        int pixel = first + 8 * i + lane / 4 - skipped;
        if (first + 8 * i >= OwnBox::kPixels || unsigned(pixel) >= unsigned(wanted)) continue;
        int to = place(pixel), swizzle = to % 8 * 16;
        unsigned char* word = stage + to * kSwizzledRow + lane % 4 * 4;
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit)
          if (unit / 4 * 4 < units)
            *reinterpret_cast<unsigned*>(word + (unit * 16 ^ swizzle)) = words[i][unit / 4][unit % 4];
      }
    }
  }

  // A lane takes a unit of a pixel; eight lanes take two pixels, so chosen that they read and write different banks.
  template <class Place>
  __device__ void split_pixels(const T* box, int width, unsigned char* stage, Place place) const {
    int unit = lane % kUnits, pair = lane / (2 * kUnits), pixel = pair ^ (lane / kUnits % 2 ? 5 : 0);
#pragma unroll
    for (int first = 0; first < OwnBox::kSegment; first += 8) {
      if (first + pixel >= width) break;
      Packed<T, kUnitValues> from =
          *reinterpret_cast<const Packed<T, kUnitValues>*>(box + (first + pixel) * OwnBox::kSlab + unit * kUnitValues);
      Row::store(stage, place(first + pixel), unit, from.value);
    }
  }
};

// Channels neighbours: the copy engine brings rows of pixels straight to where they belong, swizzled, every step-th
// pixel of a row for each plane. Each stager warp copies its share of a slab's rows.
template <class Slabs>
__device__ inline void copy_channels(const Slabs& slabs, unsigned char* stage, Mbarrier& full, int warp, int warps) {
  const WarpgroupParams& p = slabs.p;
  int rows = p.in_step[0] * p.staged_rows, own = (rows - warp + warps - 1) / warps;
  mbarrier_arrive_expect(full, own * p.span * kSwizzledRow);
#pragma unroll 1
  for (int y = warp; y < rows; y += warps) {
    StagedRow at(p, y);
    int image, h;
    at.locate(p, slabs.at, image, h);
#pragma unroll 1
    for (int plane_w = 0; plane_w < p.in_step[1]; ++plane_w) {
      int x = p.in_step[1] * slabs.at.column + plane_w + p.in_origin[1];
      int to = ((at.plane_h * p.in_step[1] + plane_w) * p.staged_rows + at.row) * p.pitch;
      tensor_copy(stage + to * kSwizzledRow, p.map, {slabs.channel(), slabs.group(), x, h, image}, full);
    }
  }
}

}  // namespace rawkern
