// Weight gradient of the transposed convolution on tensor cores, many taps from one tile (compare weight_gradient.cu):
//     gw[ci, co, kh, kw] = sum over n, hi, wi of x[n, ci, hi, wi] gy[n, co, hi stride - padding + kh dilation, ...].
//
// A product of matrices whose depth is pixels. Both operands are staged in shared memory with the pixels of a strip
// along their rows: x once, gy once for every column tap kw of the block (displaced, so that no operand begins in the
// middle of a word, whatever stride and dilation). The strip's 32 words are neighbours in the row of all images side by
// side, so narrow images waste nothing; where a strip must lie in one image, its last one may end early. A block walks
// down the strip. In each step it stages a row of x and the row of gy that belongs to it at the block's first row tap;
// the row taps kh, kh + 1, ... are the same row of gy with earlier rows of x, which a ring keeps. With stride s and
// dilation d, and g their greatest common divisor, those are the taps (s / g) apart, and rows of x (d / g) apart: the
// remainders modulo d / g are walked one after the other, the remainders of the taps modulo s / g are blocks of their
// own. So both tensors are read about once from memory.
//
// A block has kWarpgroups warpgroups, each with the products of 64 channels of x and kColumns pairs of a column tap and
// a channel of gy: kSpread of them take different channels of x, the others different row taps. All threads load step i
// + 2 into registers and store step i + 1 into another stage while step i multiplies; one barrier a step. wgmma
// multiplies by itself, but an instruction waits until the tensor cores take it: a warpgroup that has issued its
// products has seen most of them done. So the first warpgroup issues them before it stages, the last one after, one in
// between half of them before and half after, and neither the tensor cores nor what stages ever wait for each other in
// all warpgroups at once. (mma.sync: all after.) Blocks divide the channels, taps, groups, and the pixels into slices;
// the slices' partial sums [slice][group][tap][row][column] are added in order by SumSlices (weight_gradient.cu): two
// runs agree bit for bit.
//
// x outside the image is left out. gy outside is zero, as in torch, where x is multiplied by that zero: an infinity
// there gives NaN. Meant for sm_80 and later with WarpProducts, for sm_90a with WarpgroupProducts, and with
// SplitWarpgroupProducts for full float32 there.
#include "weight_gradient_staging.cuh"

namespace rawkern {

struct WeightGradientTapsParams {
  const void* input;
  const void* grad_output;
  void* partial;
  int64 in_strides[4];
  int64 out_strides[4];
  int64 next[2], apart[2];  // in bytes, of x and of gy; see RowSteps
  int64 row_pixels;         // batch * strip_width: the row of all images side by side
  int64 slices, units, slice_units;
  int in_size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];
  int groups, rows, columns;
  int strip_width;                        // of an image in that row: its width, or where strips must not straddle
                                          // images, what strips it takes
  int tap_step, row_step;                 // stride / g, dilation / g along the height
  int classes, chunks, chunk_rows;        // rows of x: classes modulo row_step, each in chunks
  int row_tiles, column_tiles;            // tiles of channels
  int tap_tiles[2];                       // of row taps, of column taps
  int tile_taps, tile_channels, inverse;  // of kColumns; see TileRows
};

// Which products are a block's.
struct TapsPlace {
  int row, column, tap_h, tap_w, taps_h, group;
  int64 slice;

  // Tiles and taps run fastest: the blocks that read the same pixels run together.
  __device__ TapsPlace(int64 block, const WeightGradientTapsParams& p, int tile_rows, int tile_taps_h) {
    row = int(block % p.row_tiles) * tile_rows;
    block /= p.row_tiles;
    column = int(block % p.column_tiles) * p.tile_channels;
    block /= p.column_tiles;
    tap_w = int(block % p.tap_tiles[1]) * p.tile_taps;
    block /= p.tap_tiles[1];
    int tile = int(block % p.tap_tiles[0]), classes = minimum_of(p.tap_step, p.kernel[0]);
    tap_h = tile % classes + tile / classes * tile_taps_h * p.tap_step;
    taps_h = minimum_of(int(ceil_div(p.kernel[0] - tap_h, p.tap_step)), tile_taps_h);
    block /= p.tap_tiles[0];
    group = int(block % p.groups);
    slice = block / p.groups;
  }
};

// A place on the way through a slice's units; a unit is a chunk of the rows of one class in one strip. Of a unit with
// `length` rows of x, step `local` stages row first_row + local * row_step; after the last row, taps - 1 steps use up
// what is in the ring.
struct TapsWalk {
  int64 unit;
  int left, local, length, first_row;  // `left`: units, this one included, in a register less than the end takes

  __device__ TapsWalk(int64 unit, int64 end, const WeightGradientTapsParams& p) : unit(unit), left(int(end - unit)) {
    enter(p);
  }

  __device__ bool done() const { return left <= 0; }
  __device__ int64 strip(const WeightGradientTapsParams& p) const { return unit / (int64(p.chunks) * p.classes); }

  // Begins the first unit from here on that has rows.
  __device__ void enter(const WeightGradientTapsParams& p) {
    local = 0;
    for (; left > 0; ++unit, --left) {
      int first = int(unit % p.chunks) * p.chunk_rows, remainder = int(unit / p.chunks % p.classes);
      length = minimum_of(p.chunk_rows, (p.in_size[0] - remainder + p.row_step - 1) / p.row_step - first);
      first_row = remainder + first * p.row_step;
      if (length > 0) return;
    }
  }

  // Goes to the next step; returns whether that begins another unit.
  __device__ bool advance(int taps, const WeightGradientTapsParams& p) {
    if (++local < length + taps - 1) return false;
    ++unit, --left;
    enter(p);
    return !done();
  }
};

template <class Products, int kWarpgroups, int kSpread, class Share>
struct WeightGradientTaps {
  using T = typename Products::Element;
  using Params = WeightGradientTapsParams;
  static constexpr int kThreads = kWarpgroups * kWarpgroup, kWarps = kThreads / kWarp;
  static constexpr int kColumns = Products::kColumns, kTaps = kWarpgroups / kSpread, kRows = 64 * kSpread;
  static constexpr int kMinBlocks = 1;
  static constexpr int kPixels = kWarp * WordOfPixels<T>::kPack;
  static constexpr int kStages = Products::kStages, kSlots = kTaps + kStages - 1;
  static constexpr int kHalves = Products::kHalves;
  static constexpr bool kSplit = Products::kSplit;
  static constexpr int kParts = kSplit ? 2 : 1;

  struct alignas(1024) Storage {
    unsigned char stage[kStages][kParts * kColumns * kSwizzledRow];  // of gy
    unsigned char slot[kSlots][kParts * kRows * kSwizzledRow];       // of x
    Strip2d<kPixels> strip[2][2];                                    // of every other unit; of x and of gy
    TileRows<T> x, y;
  };

  // What waits in registers.
  struct Staged {
    typename Share::template Input<T, kSplit, kRows, kWarps> x;
    typename Share::template GradOutput<T, kSplit, kColumns, kWarps> y;
    typename Share::template Requests<T, kRows, kThreads> requests;
  };

  // What a step does, as kStepBits bits: is there one at all, does it stage a row of x, does this warpgroup multiply?
  static constexpr int kStep = 1, kStagesInput = 2, kMultiplies = 4, kStepBits = 3;

  __device__ static void write_strip(Strip2d<kPixels> (&strip)[2], int64 number, const Params& p) {
    int pixel = threadIdx.x;
    if (pixel >= kPixels) return;
    int64 index = number * kPixels + pixel, image = quotient(index, p.strip_width);
    int column = int(index - image * p.strip_width), out_column = column * p.stride[1] - p.padding[1];
    bool exists = index < p.row_pixels && column < p.in_size[1];
    strip[0].column[pixel] = exists ? column : kNowhere;
    strip[0].offset[pixel] = image * p.in_strides[0] + column * p.in_strides[3];
    strip[1].column[pixel] = exists ? out_column : kNowhere;
    strip[1].offset[pixel] = image * p.out_strides[0] + out_column * p.out_strides[3];
  }

  __device__ static void write_rows(TileRows<T>& x, TileRows<T>& y, const Params& p, const TapsPlace& place) {
    const int64(&in)[4] = p.in_strides, (&out)[4] = p.out_strides;
    x.base = static_cast<const T*>(p.input) + (int64(place.group) * p.rows + place.row) * in[1];
    x.channel_stride = in[1], x.row_stride = in[2], x.tap_stride = 0;
    x.channels = p.rows - place.row, x.taps = 1;
    x.height = p.in_size[0], x.width = p.in_size[1];
    x.tap_rows = kRows, x.tap_inverse = 0, x.first_column = 0, x.dilation = 0, x.odd = 0;
    x.pixel_stride = in[3], x.column_step = 1;
    int first_column = place.tap_w * p.dilation[1];
    y.base = static_cast<const T*>(p.grad_output) + (int64(place.group) * p.columns + place.column) * out[1] +
             first_column * out[3];
    y.channel_stride = out[1], y.row_stride = out[2], y.tap_stride = p.dilation[1] * out[3];
    y.channels = minimum_of(p.columns - place.column, p.tile_channels), y.taps = p.kernel[1] - place.tap_w;
    y.height = p.out_size[0], y.width = p.out_size[1];
    y.tap_rows = p.tile_channels, y.tap_inverse = p.inverse, y.first_column = first_column, y.dilation = p.dilation[1];
    y.pixel_stride = p.stride[1] * out[3], y.column_step = p.stride[1];
    y.odd = (first_column - p.padding[1]) & (WordOfPixels<T>::kPack - 1);
  }

  __device__ static void store(const Staged& staged, int step, Storage& shared, int stage, int slot, int warp,
                               const RowSteps (&steps)[2]) {
    if (step & kStep) staged.y.store(shared.y, shared.stage[stage], warp, steps[1]);
    if (step & kStagesInput) staged.x.store(shared.x, shared.slot[slot], warp, steps[0]);
    Products::publish();  // before the next loads, for which this would wait
  }

  __device__ static int after(int place, int places) { return place + 1 < places ? place + 1 : 0; }

  // From a shuffle, so that the compiler sees that a warp does not diverge.
  __device__ static int uniform(int value) { return __shfl_sync(kFullMask, value, 0); }

  __device__ static void run(const Params& p) {
    RAWKERN_DYNAMIC_SHARED(Storage, shared);
    TapsPlace place(linear_block(), p, kRows, kTaps);
    if (place.slice >= p.slices || place.taps_h <= 0) return;
    int warp = __shfl_sync(kFullMask, int(threadIdx.x) / kWarp, 0), tap = warp / 4 % kTaps;
    int part = kSpread == 1 ? 0 : warp / 4 / kTaps;
    typename Products::Accumulators sum;
#pragma unroll
    for (int pair = 0; pair < Products::kPairs; ++pair) sum.at(pair, 0) = sum.at(pair, 1) = 0;
    multiply_slice(sum, shared, p, place, warp, tap, part);
    place = TapsPlace(linear_block() + opaque(0), p, kRows, kTaps);  // not kept in registers meanwhile
    if (tap < place.taps_h) write(sum, p, place, place.row + part * 64, place.tap_h + tap * p.tap_step);
  }

  __device__ static void multiply_slice(typename Products::Accumulators& sum, Storage& shared, const Params& p,
                                        const TapsPlace& place, int warp, int tap, int part) {
    int64 begin = place.slice * p.slice_units;
    TapsWalk ahead(begin, minimum_of(begin + p.slice_units, p.units), p);
    if (ahead.done()) return;
    int table = 0, taps = place.taps_h, first_out_row = place.tap_h * p.dilation[0] - p.padding[0];
    Staged staged;
    RowSteps steps[2] = {{p.next[0], p.apart[0], p.in_size[0], p.row_step, 0},
                         {p.next[1], p.apart[1], p.out_size[0], p.row_step * p.stride[0], p.padding[1] & 1}};
    // Loads the next step and goes beyond it; returns the step's bits.
    auto load_next = [&]() {
      if (ahead.done()) return 0;
      const Strip2d<kPixels>(&strip)[2] = shared.strip[table];
      int row = ahead.first_row + ahead.local * p.row_step, out_row = row * p.stride[0] + first_out_row;
      if (ahead.local == 0) {
        staged.x.begin(shared.x, row, strip[0], warp);
        staged.y.begin(shared.y, out_row, strip[1], warp);
        staged.requests.begin(shared.x, shared.y, row, out_row, strip, steps);
      }
      if (ahead.local < ahead.length) staged.x.load(shared.x, row, strip[0], warp, steps[0]);
      staged.y.load(shared.y, out_row, strip[1], warp, steps[1]);
      int left[2] = {ahead.length - 1 - ahead.local, ahead.length - 1 - ahead.local + taps - 1};
      staged.requests.next(shared.x, shared.y, row + steps[0].rows, out_row + steps[1].rows, strip, left, steps);
      int age = ahead.local - tap, step = kStep;
      if (ahead.local < ahead.length) step |= kStagesInput;
      if (tap < taps && age >= 0 && age < ahead.length) step |= kMultiplies;
      if (ahead.advance(taps, p)) write_strip(shared.strip[table ^= 1], ahead.strip(p), p);
      return step;
    };
    if (threadIdx.x == 0) write_rows(shared.x, shared.y, p, place);
    write_strip(shared.strip[0], ahead.strip(p), p);
    __syncthreads();
    int now = uniform(load_next());
    store(staged, now, shared, 0, 0, warp, steps);
    __syncthreads();
    int plan = now | uniform(load_next()) << kStepBits;  // the bits of this step, of the next, of the next but one
    bool is_first = Products::kAsynchronous && warp < 4, is_last = !Products::kAsynchronous || warp >= kWarps - 4;
    for (int stage = 0, slot = 0; (plan & kStep) != 0;) {
      // Worked out anew for each call: there is no register to keep it in.
      auto x = [&]() {
        int own_slot = slot < tap ? slot - tap + kSlots : slot - tap;
        return shared.slot[own_slot] + part * 64 * kSwizzledRow;
      };
      __syncthreads();
      if (is_first)
        Products::template multiply<kRows, 0, kHalves>(sum, x(), shared.stage[stage], (plan & kMultiplies) != 0);
      else if (!is_last)
        Products::template multiply<kRows, 0, kHalves / 2>(sum, x(), shared.stage[stage], (plan & kMultiplies) != 0);
      store(staged, plan >> kStepBits, shared, after(stage, kStages), after(slot, kSlots), warp, steps);
      plan = uniform(plan | load_next() << 2 * kStepBits);
      if (is_last)
        Products::template multiply<kRows, 0, kHalves>(sum, x(), shared.stage[stage], (plan & kMultiplies) != 0);
      else if (!is_first)
        Products::template multiply<kRows, kHalves / 2, kHalves>(sum, x(), shared.stage[stage],
                                                                 (plan & kMultiplies) != 0);
      Products::end_step();
      plan >>= kStepBits;
      stage = after(stage, kStages), slot = after(slot, kSlots);
    }
    Products::finish(sum);
  }

  __device__ static void write(typename Products::Accumulators& sum, const Params& p, const TapsPlace& place, int row,
                               int tap_h) {
    int64 tap = (place.slice * p.groups + place.group) * p.kernel[0] + tap_h;
    float* partial = static_cast<float*>(p.partial) + tap * p.kernel[1] * p.rows * p.columns;
#pragma unroll
    for (int pair = 0; pair < Products::kPairs; ++pair) {
      int own_row = row + Products::row(pair), tap_w = (Products::column(pair) / 16 * p.inverse) >> 8;
      int column = place.column + Products::column(pair) - tap_w * p.tile_channels;
      tap_w += place.tap_w;
      if (own_row >= p.rows || tap_w >= p.kernel[1]) continue;
      float* to = partial + (int64(tap_w) * p.rows + own_row) * p.columns + column;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (column + i < p.columns) to[i] = sum.at(pair, i);
    }
  }
};

}  // namespace rawkern
