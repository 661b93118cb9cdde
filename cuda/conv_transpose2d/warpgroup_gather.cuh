// The transposed convolution and its input gradient on Hopper's tensor cores (wgmma), as an implicit GEMM without
// copies.
//
//     out[n, m, u] = sum over channels k and taps j of in[n, k, position(u, j)] * weight[k, m, tap(j)]
//
// Output channels are the rows, pixels the columns, both operands lie in shared memory and are read by descriptor, so
// the loop that multiplies loads nothing into registers. The input is staged as one swizzled row of 128 bytes per pixel
// (a slab of 32 TF32 or 64 16-bit channels); pixels of the tile lie row after row, `pitch` apart. A tap is then the
// same operand begun at another pixel: one shared-memory tile serves all taps, and all phases of a stride.
//
// Tiles. The images of a batch are stacked, `stack` rows each, so that small images share tiles; a tile is `tile_rows`
// rows by `tile_columns` base pixels of the stack, plus the halo that the taps reach. Where the gather has steps (input
// gradient, stride s), the tile holds s x s planes of pixels, one for each remainder, and a tap chooses a plane. The
// accumulators' columns are the tile's pixels in the order of shared memory, the halo's columns among them; what comes
// out there is dropped. A tile is worked off in jobs: one for each pass (kPhases phases of the output that are
// neighbours within its rows) and each unit of 64 output channels.
//
// Roles. Persistent blocks of three warpgroups take tiles two at a time, one for each of the two consumers. A
// consumer's job is 64 output channels by kPhases * kPixels columns, in 128 registers of each thread. Consumers take
// turns: while one multiplies, the other one ends its last job (chain of functions, stores), so that the tensor cores
// never wait for an epilogue. Of the producers, one warp streams the packed weights by bulk copies into a ring, 64 rows
// of 128 bytes for each slab and tap; three stage the input: coalesced loads, rounding to TF32, 16-byte stores without
// bank conflicts. A tile's slabs are staged once for all its jobs if there is room (`resident`), otherwise once per
// job. Rings of mbarriers connect the roles; all roles walk through the same list of jobs.
//
// Zeros stand for pixels outside the image and channels beyond the last. What becomes of the sums is the Ending's
// business (warpgroup_endings.cuh). Registers move from the producers to the consumers, who need 128 for the sums.
// Strides are arbitrary; the loads are fastest where pixels or channels are neighbours in memory. Meant for sm_90a.
#pragma once
#include "async_copy.cuh"
#include "mbarrier.cuh"
#include "wgmma.cuh"

namespace rawkern {

constexpr int kMaxSteps = 256, kMaxPhases = 64, kMaxStages = 8;

struct WarpgroupParams {
  const void* input;
  const void* weight;   // packed (warpgroup_pack_weight.cu)
  int64 in_strides[4];  // n, c, h, w, in elements
  int64 out_strides[4];
  int64 tiles;
  int batch, groups;
  int depth, rows;                           // input and output channels of a group
  int in_size[2], in_step[2], in_origin[2];  // plane a of staged row r holds the input's row step * r + a + origin
  int out_size[2], out_step[2], base_size[2];
  int stack, tile_rows, tile_columns, column_tiles;
  int staged_rows, staged_columns, pitch, stage_pixels;
  int stages, slabs, last_slices;  // slices: of 32 bytes of channels, that the last slab has
  int units;                       // of a group, each 64 output channels
  int passes;
  int channels_last;                 // the input's channels are neighbours and can be loaded 16 bytes at a time
  short phase[kMaxPhases][2];        // of each pass, its first phase: row and column
  short first_step[kMaxPhases + 1];  // of phase i of pass q, at q * kPhases + i
  short offset[kMaxSteps];           // of each step, the pixels by which its tap is displaced in the tile
};

template <class T>
struct OperandOf {
  using type = T;
};
template <>
struct OperandOf<float> {
  using type = Tf32;
};

// Division of small numbers (below 2^20) by the same divisor: a multiplication. (n + 1/2) / d is at least 1 / 2d away
// from a whole number, and the rounding error is smaller than that.
struct Divisor {
  int divisor;
  float inverse;
  __device__ explicit Divisor(int divisor) : divisor(divisor), inverse(1.0f / float(divisor)) {}
  __device__ int divide(int n, int& remainder) const {
    int quotient = int((float(n) + 0.5f) * inverse);
    remainder = n - quotient * divisor;
    return quotient;
  }
};

// A place in a ring of buffers, and the parity of its current round.
struct Ring {
  int slot = 0;
  unsigned parity = 0;
  __device__ void advance(int count, int size) {
    for (slot += count; slot >= size; slot -= size) parity ^= 1;
  }
};

// A tile: where it begins in the stack of images, and its group.
struct TilePlace {
  int group, image, row, column;  // `row` of image `image`, counted in base pixels; `column` likewise
  int64 row_tile;
  int column_tile;

  __device__ TilePlace(const WarpgroupParams& p, int64 tile, int groups) {
    group = int(tile % groups);
    tile /= groups;
    column_tile = int(tile % p.column_tiles);
    row_tile = tile / p.column_tiles;
    int first_row = int(row_tile) * p.tile_rows;
    image = first_row / p.stack;
    row = first_row - image * p.stack;
    column = column_tile * p.tile_columns;
  }

  // The image and row (which may lie beyond the last) of a row of the tile.
  __device__ void locate(const WarpgroupParams& p, int row_of_tile, int& at_image, int& at_row) const {
    at_image = image;
    at_row = row + row_of_tile;
    if (at_row >= p.stack) {
      int images = at_row / p.stack;
      at_image += images;
      at_row -= images * p.stack;
    }
  }
};

// The input's way into shared memory, for both layouts: which pixels a tile's stage holds.
struct StagedPixels {
  const WarpgroupParams& p;
  Divisor span, staged_rows, step;

  __device__ explicit StagedPixels(const WarpgroupParams& p)
      : p(p), span(p.pitch * p.in_step[1]), staged_rows(p.staged_rows), step(p.in_step[1]) {}

  // Of a whole stage, in the order in which rows of the input are read.
  __device__ int count() const { return p.in_step[0] * p.staged_rows * p.pitch * p.in_step[1]; }

  // Where pixel `index` goes in the stage.
  __device__ int place(int index) const {
    if (p.in_step[0] * p.in_step[1] == 1) return index;
    int x, row, plane_w, y = span.divide(index, x), plane_h = staged_rows.divide(y, row);
    int column = step.divide(x, plane_w);
    return ((plane_h * p.in_step[1] + plane_w) * p.staged_rows + row) * p.pitch + column;
  }

  // Channel 0 of pixel `index`, in elements, and its column in the image; false if its row is outside.
  __device__ bool locate(const TilePlace& tile, int index, int64& source, int& column) const {
    int x, row, y = span.divide(index, x), plane_h = staged_rows.divide(y, row), image, at_row;
    tile.locate(p, row, image, at_row);
    int h = p.in_step[0] * at_row + plane_h + p.in_origin[0];
    column = p.in_step[1] * tile.column + x + p.in_origin[1];
    source = image * p.in_strides[0] + h * p.in_strides[2] + column * p.in_strides[3];
    return image < p.batch && unsigned(h) < unsigned(p.in_size[0]) && plane_h < p.in_step[0];
  }
};

// A slab of a tile, as the stagers fill it.
struct Fill {
  TilePlace tile;
  int64 first_channel;
  int channels, units;  // channels that exist; units of 16 bytes of channels that are multiplied
};

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T values[kCount];
};

struct alignas(16) Unit {
  unsigned words[4];
};
__device__ inline Unit& unit_at(unsigned char* stage, int place, int unit) {
  return *reinterpret_cast<Unit*>(stage + swizzled(place, unit));
}

// Channels apart, pixels neighbours (NCHW, and any other strides). A warp takes 32 pixels at a time. Asynchronous
// copies bring their channels as they lie in memory, row by row, into a buffer of the warp's own, kDepth of them in
// turn, so that the next pixels are under way, past the registers, while these are turned around: lanes read the
// channels of their pixels, round, and write 16 bytes of a pixel's channels at a time.
template <class T, int kDepth_>
struct PixelStager : StagedPixels {
  static constexpr int kDepth = kDepth_;
  static constexpr int kSlab = kSwizzledRow / sizeof(T), kUnit = 16 / sizeof(T);
  static constexpr int kHalf = 32;  // channels; the second half of 16-bit ones is shifted to other banks

  struct alignas(16) Raw {
    T at[kSlab * kWarp + (kSlab > kHalf ? 32 : 0)];
    __device__ T* row(int channel) { return at + channel * kWarp + (channel >= kHalf ? 32 : 0); }
  };

  int vector = 1;  // pixels that one copy may bring

  __device__ explicit PixelStager(const WarpgroupParams& p) : StagedPixels(p) {}

  // Copies of several pixels need them aligned in every row and image, and all inside or all outside.
  __device__ void set_vector(const TilePlace& tile) {
    int64 misaligned = p.in_strides[0] | p.in_strides[1] | p.in_strides[2] | p.in_size[1] |
                       (p.in_step[1] * tile.column + p.in_origin[1]) |
                       int64(reinterpret_cast<uint64>(p.input) / sizeof(T));
    constexpr int kMost = 16 / sizeof(T);
    vector = p.in_strides[3] != 1 ? 1 : 1 << (misaligned & 1 ? 0 : misaligned & 2 ? 1 : misaligned & 4 ? 2 : 3);
    vector = vector < kMost ? vector : kMost;
  }

  template <int kVector>
  __device__ void copy(Raw& raw, const Fill& fill, int batch) const {
    constexpr int kLanes = kWarp / kVector;  // along the pixels; the others along the channels
    int lane = threadIdx.x % kWarp, pixel = lane % kLanes * kVector, sub = lane / kLanes, column;
    int64 offset;
    bool inside = locate(fill.tile, batch * kWarp + pixel, offset, column) && unsigned(column) < unsigned(p.in_size[1]);
    const T* source = static_cast<const T*>(p.input) + offset + (fill.first_channel + sub) * p.in_strides[1];
    int left = inside ? fill.channels - sub : 0;
#pragma unroll
    for (int c = 0; c < kSlab; c += kVector) {
      if (c >= fill.units * kUnit) break;
      T* to = raw.row(c + sub) + pixel;
      if constexpr (kVector * sizeof(T) >= 4)
        async_copy_or_zero(reinterpret_cast<Vector<T, kVector>*>(to),
                           reinterpret_cast<const Vector<T, kVector>*>(source), c < left);
      else
        *to = c < left ? *source : T{};
      source += kVector * p.in_strides[1];
    }
  }

  __device__ void start(Raw& raw, const Fill& fill, int batch) const {
    if (vector == 8)
      copy<16 / sizeof(T)>(raw, fill, batch);
    else if (vector == 4)
      copy<4>(raw, fill, batch);
    else if (vector == 2)
      copy<2>(raw, fill, batch);
    else
      copy<1>(raw, fill, batch);
  }

  // float: a lane has one pixel.
  __device__ void turn(Raw& raw, unsigned char* stage, const Fill& fill, int batch, float) const {
    int lane = threadIdx.x % kWarp, index = batch * kWarp + lane, to = place(index);
    if (index >= count()) return;
#pragma unroll
    for (int unit = 0; unit < kSlab / kUnit; ++unit) {
      if (unit >= fill.units) break;
      Unit value;
#pragma unroll
      for (int i = 0; i < 4; ++i) value.words[i] = tf32_operand(to_accumulator(raw.row(unit * kUnit + i)[lane]));
      unit_at(stage, to, unit) = value;
    }
  }

  // 16 bits: a lane has two neighbouring pixels and half of the channels.
  template <class Element>
  __device__ void turn(Raw& raw, unsigned char* stage, const Fill& fill, int batch, Element) const {
    int pixel = threadIdx.x % kWarp % 16 * 2, half = threadIdx.x % kWarp / 16, index = batch * kWarp + pixel;
    int first = place(index), second = place(index + 1);
    if (index >= count()) return;
#pragma unroll
    for (int u = 0; u < kSlab / kUnit / 2; ++u) {
      int unit = half * (kSlab / kUnit / 2) + u;
      if (unit >= fill.units) break;
      Unit low, high;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned even = *reinterpret_cast<const unsigned*>(raw.row(unit * kUnit + 2 * i) + pixel);
        unsigned odd = *reinterpret_cast<const unsigned*>(raw.row(unit * kUnit + 2 * i + 1) + pixel);
        low.words[i] = (even & 0xffffu) | odd << 16;
        high.words[i] = even >> 16 | (odd & 0xffff0000u);
      }
      unit_at(stage, first, unit) = low;
      unit_at(stage, second, unit) = high;
    }
  }
};

// Channels neighbours, in units of 16 bytes: they are copied to where they belong, and float is rounded there. A warp
// takes 16 pixels at a time: eight lanes have the units of a pixel, and each lane four pixels in a row.
template <class T>
struct ChannelStager : StagedPixels {
  static constexpr int kUnit = 16 / sizeof(T), kBlock = 4, kPixels = kWarp / 8 * kBlock;

  __device__ explicit ChannelStager(const WarpgroupParams& p) : StagedPixels(p) {}

  __device__ void copy(unsigned char* stage, const Fill& fill, int index) const {
    int unit = threadIdx.x % 8, column;
    int64 offset;
    bool inside = locate(fill.tile, index, offset, column) && unit * kUnit < fill.channels;
    const T* source = static_cast<const T*>(p.input) + offset + fill.first_channel + unit * kUnit;
    if (unit >= fill.units || index >= count()) return;
#pragma unroll
    for (int e = 0; e < kBlock; ++e) {
      bool exists = inside && unsigned(column + e) < unsigned(p.in_size[1]);
      async_copy_or_zero(&unit_at(stage, place(index + e), unit), reinterpret_cast<const Unit*>(source), exists);
      source += p.in_strides[3];
    }
  }

  __device__ void round(unsigned char* stage, const Fill& fill, int index) const {
    int unit = threadIdx.x % 8;
    if (unit >= fill.units || index >= count()) return;
#pragma unroll
    for (int e = 0; e < kBlock; ++e) {
      Unit& value = unit_at(stage, place(index + e), unit);
#pragma unroll
      for (int i = 0; i < 4; ++i) value.words[i] = tf32_operand(__uint_as_float(value.words[i]));
    }
  }

  __device__ void fill(unsigned char* stage, const Fill& fill, int warp, int warps) const {
    int first = warp * kPixels + threadIdx.x % kWarp / 8 * kBlock;
#pragma unroll 1
    for (int index = first; index < count(); index += warps * kPixels) copy(stage, fill, index);
    async_wait_all();
    if (sizeof(T) != 4) return;
#pragma unroll 1
    for (int index = first; index < count(); index += warps * kPixels) round(stage, fill, index);
  }
};

// One multiplication: of consumer `consumer`, whose tile may not exist at the end of the list.
struct Job {
  int consumer;
  int64 tile;
  bool exists;
  int pass, unit;    // unit over all groups of the tile
  bool first, last;  // of its tile
};

// T: element type; kPhases: phases of a pass; kPixels: columns per phase; kStageBytes: shared memory for staged input;
// Ending: what becomes of the sums.
template <class T, int kPhases_, int kPixels_, int kStageBytes, class Ending>
struct WarpgroupGather {
  using Operand = typename OperandOf<T>::type;
  static constexpr int kPhases = kPhases_, kPixels = kPixels_;
  static constexpr int kConsumers = 2, kProducers = 1;  // warpgroups
  static constexpr int kConsumerWarps = 4 * kConsumers, kStagerWarps = 4 * kProducers - 1;
  static constexpr int kThreads = (kConsumers + kProducers) * kWarpgroup;
  static constexpr int kMinBlocks = 1;
  static constexpr int kRows = 64;
  static constexpr int kSlab = kSwizzledRow / sizeof(T);
  using Pixels = PixelStager<T, Ending::kRawDepth>;
  static constexpr int kWeightStages = 4, kWeightBytes = kRows * kSwizzledRow;
  static constexpr int kConsumerRegisters = 208, kProducerRegisters = 88;
  // What the warpgroups hold together is what the block was launched with, or they wait for registers for ever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kConsumers * kConsumerRegisters + kProducers * kProducerRegisters <=
                    (kConsumers + kProducers) * kLaunchRegisters,
                "more registers than the block has");

  struct Params {
    WarpgroupParams gather;
    typename Ending::Params ending;
  };

  struct alignas(1024) Memory {
    unsigned char stages[kStageBytes];
    unsigned char weights[kWeightStages][kWeightBytes];
    typename Pixels::Raw raw[kStagerWarps][Pixels::kDepth];
    typename Ending::template Storage<WarpgroupGather> ending;
    Mbarrier stage_full[kMaxStages], stage_empty[kMaxStages];
    Mbarrier weight_full[kWeightStages], weight_empty[kWeightStages];
    Mbarrier turn[kConsumers];
  };
#if RAWKERN_GPU
  static_assert(sizeof(Memory) <= 227 * 1024, "more shared memory than a block has");
#endif

  // An Ending that must see all channels has the groups among a tile's units; otherwise each group has its own tiles.
  __device__ static int groups_per_tile(const WarpgroupParams& p) { return Ending::kAllRows ? p.groups : 1; }
  __device__ static TilePlace place(const WarpgroupParams& p, int64 tile) {
    return TilePlace(p, tile, Ending::kAllRows ? 1 : p.groups);
  }
  __device__ static int group_of(const WarpgroupParams& p, const TilePlace& tile, int unit) {
    return Ending::kAllRows ? unit / p.units : tile.group;
  }
  // Whether the slabs of both consumers' tiles stay in shared memory for all their jobs.
  __device__ static bool resident(const WarpgroupParams& p) {
    return kConsumers * p.slabs <= p.stages && groups_per_tile(p) == 1;
  }

  // visit(job) for every job of this block, in the order in which they are multiplied.
  template <class Visit>
  __device__ static void for_each(const WarpgroupParams& p, Visit visit) {
    int units = p.units * groups_per_tile(p);
    int64 step = int64(gridDim.x) * gridDim.y;
    for (int64 tile = linear_block(); tile < p.tiles; tile += kConsumers * step)
      for (int pass = 0; pass < p.passes; ++pass)
        for (int unit = 0; unit < units; ++unit)
          for (int consumer = 0; consumer < kConsumers; ++consumer) {
            int64 own = tile + consumer * step;
            bool first = pass == 0 && unit == 0, last = pass == p.passes - 1 && unit == units - 1;
            visit(Job{consumer, own, own < p.tiles, pass, unit, first, last});
          }
  }

  __device__ static int steps_before(const WarpgroupParams& p, int pass) {
    return p.first_step[pass * kPhases] * p.slabs;
  }

  __device__ static void stream_weights(const WarpgroupParams& p, Memory& memory) {
    Ring ring;
    for_each(p, [&](const Job& job) {
      if (!job.exists) return;
      TilePlace tile = place(p, job.tile);
      int64 unit = Ending::kAllRows ? job.unit : tile.group * p.units + job.unit;
      int first = steps_before(p, job.pass), last = steps_before(p, job.pass + 1);
      const unsigned char* source =
          static_cast<const unsigned char*>(p.weight) + (unit * steps_before(p, p.passes) + first) * kWeightBytes;
      for (int step = first; step < last; ++step) {
        mbarrier_wait(memory.weight_empty[ring.slot], ring.parity ^ 1);
        mbarrier_arrive_expect(memory.weight_full[ring.slot], kWeightBytes);
        bulk_copy(memory.weights[ring.slot], source, kWeightBytes, memory.weight_full[ring.slot]);
        source += kWeightBytes;
        ring.advance(1, kWeightStages);
      }
    });
  }

  // The slabs that the stagers fill, in the order in which they are needed: those of for_each's jobs, or, where they
  // stay for all jobs of a tile, those of its first.
  struct Fills {
    const WarpgroupParams& p;
    bool once;
    int units;
    int64 step, tile;  // `tile` of the first consumer
    int pass = 0, unit = 0, consumer = 0, slab = 0;
    TilePlace at;

    __device__ explicit Fills(const WarpgroupParams& p)
        : p(p),
          once(resident(p)),
          units(p.units * groups_per_tile(p)),
          step(int64(gridDim.x) * gridDim.y),
          tile(linear_block()),
          at(place(p, tile)) {}

    __device__ bool valid() const { return tile < p.tiles; }

    __device__ void advance() {
      if (++slab < p.slabs) return;
      slab = 0;
      do next_job();
      while (valid() && tile + consumer * step >= p.tiles);
      if (valid()) at = place(p, tile + consumer * step);
    }

    __device__ void next_job() {
      if (++consumer < kConsumers) return;
      consumer = 0;
      if (!once && ++unit < units) return;
      unit = 0;
      if (!once && ++pass < p.passes) return;
      pass = 0;
      tile += kConsumers * step;
    }

    __device__ Fill fill() const {
      int first = slab * kSlab;
      return Fill{at, int64(group_of(p, at, unit)) * p.depth + first, p.depth - first,
                  2 * (slab == p.slabs - 1 ? p.last_slices : 4)};
    }
  };

  __device__ static unsigned char* wait_for_stage(const WarpgroupParams& p, Memory& memory, const Ring& ring) {
    mbarrier_wait(memory.stage_empty[ring.slot], ring.parity ^ 1);
    return memory.stages + ring.slot * p.stage_pixels * kSwizzledRow;
  }
  __device__ static void give_stage(const WarpgroupParams& p, Memory& memory, Ring& ring) {
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(memory.stage_full[ring.slot]);
    ring.advance(1, p.stages);
  }

  __device__ static void stage_channels(const WarpgroupParams& p, Memory& memory, int warp) {
    Ring ring;
    ChannelStager<T> stager(p);
    for (Fills fills(p); fills.valid(); fills.advance()) {
      stager.fill(wait_for_stage(p, memory, ring), fills.fill(), warp, kStagerWarps);
      give_stage(p, memory, ring);
    }
  }

  // A stager warp's batches of 32 pixels, slab after slab.
  struct Batches {
    Fills fills;
    Fill fill;
    int warp, count, batch;

    __device__ Batches(const WarpgroupParams& p, int warp, int count)
        : fills(p), fill(fills.fill()), warp(warp), count(count), batch(warp) {}

    __device__ bool valid() const { return batch < count && fills.valid(); }
    // To the next batch; returns whether that ends the slab.
    __device__ bool advance() {
      batch += kStagerWarps;
      if (batch < count) return false;
      batch = warp;
      fills.advance();
      if (fills.valid()) fill = fills.fill();
      return true;
    }
  };

  // Up to Pixels::kDepth batches are under way, which may belong to later slabs, while one is turned around.
  __device__ static void stage_pixels(const WarpgroupParams& p, Memory& memory, int warp) {
    constexpr int kDepth = Pixels::kDepth;
    Pixels stager(p);
    Batches now(p, warp, int(ceil_div(stager.count(), kWarp))), ahead = now;
    Ring ring, raw, raw_ahead;
    auto start = [&] {
      if (ahead.valid()) {
        stager.set_vector(ahead.fill.tile);
        stager.start(memory.raw[warp][raw_ahead.slot], ahead.fill, ahead.batch);
        ahead.advance();
      }
      raw_ahead.advance(1, kDepth);
      async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < kDepth - 1; ++i) start();
    while (now.fills.valid()) {
      unsigned char* stage = wait_for_stage(p, memory, ring);
      for (bool done = false; !done; done = now.advance()) {
        start();
        async_wait<kDepth - 1>();
        __syncwarp();
        if (now.valid()) stager.turn(memory.raw[warp][raw.slot], stage, now.fill, now.batch, T{});
        __syncwarp();
        raw.advance(1, kDepth);
      }
      give_stage(p, memory, ring);
    }
  }

  // A consumer's side of the rings: where its next weights and its tile's slabs are, what it has read but not yet given
  // back, and whose turn it is.
  struct Reader {
    Memory& memory;
    Ring weights, tile, next_tile;
    int held_weights = -1, held_stage = -1;
    unsigned turn = 0;

    __device__ void give_back() {
      bool leader = threadIdx.x % kWarp == 0;
      if (leader && held_weights >= 0) mbarrier_arrive(memory.weight_empty[held_weights]);
      if (leader && held_stage >= 0) mbarrier_arrive(memory.stage_empty[held_stage]);
      held_weights = held_stage = -1;
    }
    // The first consumer begins; after that, each one's turn ends the other one's wait.
    __device__ void wait_turn(int consumer) {
      mbarrier_wait(memory.turn[consumer], turn ^ (consumer == 0));
      turn ^= 1;
    }
    __device__ void pass_turn(int consumer) {
      if (threadIdx.x % kWarp == 0) mbarrier_arrive(memory.turn[consumer ^ 1]);
    }
  };

  // The products of one slab and tap: kSlices instructions of 32 bytes of channels, committed where they are issued:
  // the assembler closes a group at the end of a basic block by itself, and waiting for a number of groups would count
  // it.
  template <int kSlices, int kRegisters>
  __device__ static void multiply(float (&sum)[kRegisters], uint64 weights, uint64 pixels) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSlices; ++k)
      wgmma<Operand>(sum, advance_descriptor(weights, k * 32), advance_descriptor(pixels, k * 32));
    wgmma_commit();
  }
  template <int kRegisters>
  __device__ static void multiply(float (&sum)[kRegisters], uint64 weights, uint64 pixels, int slices) {
    if (slices == 4)
      multiply<4>(sum, weights, pixels);
    else if (slices == 3)
      multiply<3>(sum, weights, pixels);
    else if (slices == 2)
      multiply<2>(sum, weights, pixels);
    else
      multiply<1>(sum, weights, pixels);
  }

  // The sums of one job. A slot of a ring is given back when the products after the ones that read it have been issued,
  // and the turn is passed on before the last products are done, so that the tensor cores never run dry.
  __device__ static void accumulate(const WarpgroupParams& p, Reader& reader, float (&sum)[kPhases][kPixels / 2],
                                    const Job& job, bool give_stages_back) {
    Memory& memory = reader.memory;
    Ring stages = reader.tile;
    for (int slab = 0; slab < p.slabs; ++slab) {
      // Through a shuffle, so that the compiler knows that the warp agrees: it would wait for every product otherwise.
      int slices = __shfl_sync(kFullMask, slab == p.slabs - 1 ? p.last_slices : 4, 0);
      mbarrier_wait(memory.stage_full[stages.slot], stages.parity);
      uint64 pixels = matrix_descriptor(memory.stages + stages.slot * p.stage_pixels * kSwizzledRow);
#pragma unroll
      for (int i = 0; i < kPhases; ++i) {
        int end = p.first_step[job.pass * kPhases + i + 1];
#pragma unroll 1
        for (int step = p.first_step[job.pass * kPhases + i]; step < end; ++step) {
          mbarrier_wait(memory.weight_full[reader.weights.slot], reader.weights.parity);
          uint64 weights = matrix_descriptor(memory.weights[reader.weights.slot]);
          multiply(sum[i], weights, advance_descriptor(pixels, p.offset[step] * kSwizzledRow), slices);
          wgmma_wait<1>();
          reader.give_back();
          reader.held_weights = reader.weights.slot;
          reader.weights.advance(1, kWeightStages);
        }
      }
      if (give_stages_back) {
        if (reader.held_stage >= 0) {  // no products in between
          wgmma_wait<0>();
          reader.give_back();
        }
        reader.held_stage = stages.slot;
      }
      stages.advance(1, p.stages);
    }
    reader.pass_turn(job.consumer);
    wgmma_wait<0>();
    reader.give_back();
#pragma unroll
    for (int i = 0; i < kPhases; ++i) pin(sum[i]);
  }

  __device__ static void consume(const Params& params, Memory& memory, int consumer) {
    const WarpgroupParams& p = params.gather;
    Reader reader{memory};
    Ending ending(params.ending, p);
    bool once = resident(p);
    for_each(p, [&](const Job& job) {
      if (job.exists && (!once || job.first)) {
        if (job.consumer == consumer) reader.tile = reader.next_tile;
        reader.next_tile.advance(p.slabs, p.stages);
      }
      if (job.consumer != consumer) {
        if (job.exists)
          reader.weights.advance(steps_before(p, job.pass + 1) - steps_before(p, job.pass), kWeightStages);
        return;
      }
      float sum[kPhases][kPixels / 2];
#pragma unroll
      for (int i = 0; i < kPhases; ++i) {
#pragma unroll
        for (int j = 0; j < kPixels / 2; ++j) sum[i][j] = 0;
        pin(sum[i]);
      }
      reader.wait_turn(consumer);
      if (!job.exists) {
        reader.pass_turn(consumer);
        return;
      }
      accumulate(p, reader, sum, job, !once || job.last);
      TilePlace tile = place(p, job.tile);
      int group = group_of(p, tile, job.unit), first_row = job.unit % p.units * kRows;
      ending.template consume<WarpgroupGather>(memory.ending, sum, tile, job, group * p.rows, first_row);
    });
  }

  __device__ static void run(const Params& params) {
    RAWKERN_DYNAMIC_SHARED(Memory, memory);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kMaxStages; ++i) {
        mbarrier_init(memory.stage_full[i], kStagerWarps);
        mbarrier_init(memory.stage_empty[i], 4);
      }
      for (int i = 0; i < kWeightStages; ++i) {
        mbarrier_init(memory.weight_full[i], 1);
        mbarrier_init(memory.weight_empty[i], 4);
      }
      for (int i = 0; i < kConsumers; ++i) mbarrier_init(memory.turn[i], 4);
      mbarrier_fence_init();
    }
    __syncthreads();
    int warp = __shfl_sync(kFullMask, int(threadIdx.x / kWarp), 0);
    if (warp >= kConsumerWarps) {
      fewer_registers<kProducerRegisters>();
      if (warp == kConsumerWarps) {
        if (threadIdx.x % kWarp == 0) stream_weights(params.gather, memory);
      } else if (params.gather.channels_last) {
        stage_channels(params.gather, memory, warp - kConsumerWarps - 1);
      } else {
        stage_pixels(params.gather, memory, warp - kConsumerWarps - 1);
      }
    } else {
      more_registers<kConsumerRegisters>();
      consume(params, memory, warp / 4);
    }
  }
};

}  // namespace rawkern
