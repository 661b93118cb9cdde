// The transposed convolution and its input gradient on Hopper's tensor cores (wgmma), as an implicit GEMM without
// copies.
//
//     out[n, m, u] = sum over channels k and taps j of in[n, k, position(u, j)] * weight[k, m, tap(j)]
//
// Output channels are the rows, pixels the columns, both operands lie in shared memory and are read by descriptor, so
// the loop that multiplies loads nothing into registers. The input is staged as one swizzled row of 128 bytes per pixel
// (a slab of 32 TF32 or 64 16-bit channels, or of 16 split floats, see below); pixels of the tile lie row after row,
// `pitch` apart. A tap is then the same operand begun at another pixel: one shared-memory tile serves all taps, and all
// phases of a stride.
//
// Tiles. The images of a batch are stacked, `stack` rows each, so that small images share tiles; a tile is `tile_rows`
// rows by `tile_columns` base pixels of the stack, plus the halo that the taps reach. Where the gather has steps (input
// gradient, stride s), the tile holds s x s planes of pixels, one for each remainder, and a tap chooses a plane. The
// accumulators' columns are the tile's pixels in the order of shared memory, the halo's columns among them; what comes
// out there is dropped. A tile is worked off in jobs: one for each pass (kPhases phases of the output that are
// neighbours within its rows) and each unit of 64 output channels. Where tiles are few, their jobs are divided among
// `parts`, which count as tiles.
//
// Roles. Persistent blocks of three warpgroups take tiles two at a time, one for each of the two consumers. A
// consumer's job is 64 output channels by kPhases * kPixels columns, in 128 registers of each thread. Consumers take
// turns: while one multiplies, the other one ends its last job (chain of functions, stores), so that the tensor cores
// never wait for an epilogue. Of the producers, one warp streams the packed weights by bulk copies into a ring, 64 rows
// of 128 bytes for each slab and tap; three stage the input, by the copy engine (warpgroup_boxes.cuh) or
// pixel by pixel (warpgroup_staging.cuh). A tile's slabs are staged once for all its jobs if
// there is room (`resident`), otherwise once per job. Rings of mbarriers connect the roles; all roles walk through the
// same list of jobs. How many stages, boxes and weights there are in shared memory is the plan's choice: a ring of
// weights too short to hide a copy's latency would set the pace where a phase has few pixels.
//
// Full float32 (kSplit): each value is the sum of two TF32 numbers (split_tf32), of which a slab's row holds the high
// ones of 16 channels and then the low ones. A tap is three products: low * high, high * low, high * high. The tensor
// cores cut what they add to a sum, always towards zero, so sums are kept short: those of two taps, small products
// first, are added to totals by ordinary instructions, which leaves registers for half as many columns.
//
// Zeros stand for pixels outside the image and channels beyond the last. What becomes of the sums is the Ending's
// business (warpgroup_endings.cuh). Registers move from the producers to the consumers, who need 128 for the sums.
// Strides are arbitrary; the loads are fastest where pixels or channels are neighbours in memory. Meant for sm_90a.
#pragma once
#include "mbarrier.cuh"
#include "warpgroup_boxes.cuh"
#include "warpgroup_staging.cuh"
#include "wgmma.cuh"

namespace rawkern {

// One multiplication: of consumer `consumer`, whose tile may not exist at the end of the list.
struct Job {
  int consumer;
  int tile;
  bool exists;
  int pass, unit;    // unit over all groups of the tile
  bool first, last;  // of its tile
};

// T: element type; kSplit: float in two parts; kPhases: phases of a pass; kPixels: columns per phase; kPoolBytes:
// shared memory for staged input and weights, which a plan divides between the two; Ending: what becomes of the sums.
template <class T, bool kSplit, int kPhases_, int kPixels_, int kPoolBytes, class Ending>
struct WarpgroupGather {
  using Operand = typename OperandOf<T>::type;
  using Row = OperandRow<T, kSplit>;
  static constexpr int kPhases = kPhases_, kPixels = kPixels_;
  static constexpr int kConsumers = 2, kProducers = 1;  // warpgroups
  static constexpr int kConsumerWarps = 4 * kConsumers, kStagerWarps = 4 * kProducers - 1;
  static constexpr int kThreads = (kConsumers + kProducers) * kWarpgroup;
  static constexpr int kMinBlocks = 1;
  static constexpr int kRows = 64;
  static constexpr int kSlab = Row::kChannels, kSlabSlices = Row::kUnits / 2;
  static constexpr int kWeightBytes = kRows * kSwizzledRow, kTapsTogether = 2, kProducts = kSplit ? 3 : 1;
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
    unsigned char pool[kPoolBytes];
    typename Ending::template Storage<WarpgroupGather> ending;
    Mbarrier stage_full[kMaxStages], weight_full[kMaxWeightStages];
    Mbarrier empty[kMaxStages + kMaxWeightStages];  // of stages, then of weights
    Mbarrier turn[kConsumers];
    Mbarrier box_full[kStagerWarps][kMaxBoxes];
    BoxPlace box_place[kStagerWarps][kMaxBoxes];

    // Stages from the pool's beginning, then boxes; weights up to its end.
    __device__ unsigned char* stage(const WarpgroupParams& p, int slot) {
      return pool + slot * p.stage_pixels * kSwizzledRow;
    }
    __device__ unsigned char* box(const WarpgroupParams& p, int warp, int slot) {
      return stage(p, p.stages) + (warp * p.boxes + slot) * p.box_bytes;
    }
    __device__ unsigned char* weights(const WarpgroupParams& p, int slot) {
      return pool + kPoolBytes - (p.weight_stages - slot) * kWeightBytes;
    }
  };
#if RAWKERN_GPU
  static_assert(sizeof(Memory) <= 227 * 1024, "more shared memory than a block has");
#endif

  // An Ending that must see all channels has the groups among a tile's units; otherwise each group has its own tiles.
  __device__ static int groups_per_tile(const WarpgroupParams& p) { return Ending::kAllRows ? p.groups : 1; }
  __device__ static TilePlace place(const WarpgroupParams& p, int tile) { return TilePlace(p, tile, Ending::kAllRows); }
  __device__ static int group_of(const WarpgroupParams& p, const TilePlace& tile, int unit) {
    return Ending::kAllRows ? unit / p.units : tile.group;
  }
  // Whether the slabs of both consumers' tiles stay in shared memory for all their jobs.
  __device__ static bool resident(const WarpgroupParams& p) {
    return kConsumers * p.slabs <= p.stages && groups_per_tile(p) == 1;
  }

  // A job's place among those of its tile.
  struct JobPlace {
    int pass = 0, unit = 0;
    __device__ JobPlace(const WarpgroupParams& p, int tile) {
      if (p.parts == 1) return;
      unsigned job = unsigned(tile) % unsigned(p.parts) * p.jobs, units = units_per_tile(p);
      pass = job / units;
      unit = job - pass * units;
    }
    __device__ void advance(int units) {
      if (++unit < units) return;
      unit = 0;
      ++pass;
    }
  };
  __device__ static int units_per_tile(const WarpgroupParams& p) { return p.units * groups_per_tile(p); }

  // visit(job) for every job of this block, in the order in which they are multiplied.
  template <class Visit>
  __device__ __forceinline__ static void for_each(const WarpgroupParams& p, Visit visit) {
    int step = gridDim.x, units = units_per_tile(p);
    for (int tile = blockIdx.x; tile < p.tiles; tile += kConsumers * step) {
      JobPlace first(p, tile), second(p, tile + step);
      for (int i = 0; i < p.jobs; ++i) {
        for (int consumer = 0; consumer < kConsumers; ++consumer) {
          int own = tile + consumer * step;
          visit(Job{consumer, own, own < p.tiles, consumer ? second.pass : first.pass,
                    consumer ? second.unit : first.unit, i == 0, i == p.jobs - 1});
        }
        first.advance(units);
        second.advance(units);
      }
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
        mbarrier_wait(memory.empty[kMaxStages + ring.slot], ring.parity ^ 1);
        mbarrier_arrive_expect(memory.weight_full[ring.slot], kWeightBytes);
        bulk_copy(memory.weights(p, ring.slot), source, kWeightBytes, memory.weight_full[ring.slot]);
        source += kWeightBytes;
        ring.advance(p.weight_stages);
      }
    });
  }

  // The slabs that the stagers fill, in the order in which they are needed: those of for_each's jobs, or, where they
  // stay for all jobs of a tile, those of its first.
  struct Slabs {
    const WarpgroupParams& p;
    int jobs, step, tile;  // `tile` of the first consumer
    int job = 0, consumer = 0, slab = 0;
    TilePlace at;  // below the last image when there are no more

    __device__ explicit Slabs(const WarpgroupParams& p)
        : p(p), jobs(resident(p) ? 1 : p.jobs), step(gridDim.x), tile(blockIdx.x), at(place(p, tile)) {}

    __device__ int64 count() const {
      int64 tiles = (p.tiles - 1 - int(blockIdx.x)) / step + 1;
      return tiles * jobs * p.slabs;
    }

    __device__ void advance() {
      if (++slab < p.slabs) return;
      slab = 0;
      do next_job();
      while (tile < p.tiles && tile + consumer * step >= p.tiles);
      if (tile < p.tiles)
        at = place(p, tile + consumer * step);
      else
        at.image = p.batch;
    }

    __device__ void next_job() {
      if (++consumer < kConsumers) return;
      consumer = 0;
      if (++job < jobs) return;
      job = 0;
      tile += kConsumers * step;
    }

    __device__ bool exists() const { return tile < p.tiles; }
    // The slab's first channel in the input, or in its group, and how many channels from there on belong to the group.
    __device__ int64 first_channel() const { return int64(group()) * p.depth + channel(); }
    __device__ int channel() const { return slab * kSlab; }
    __device__ int group() const {
      if (!Ending::kAllRows) return at.group;
      if (p.groups == 1) return 0;
      int units = units_per_tile(p), first = unsigned(tile + consumer * step) % unsigned(p.parts) * p.jobs;
      return unsigned(first + job) % unsigned(units) / unsigned(p.units);
    }
    __device__ int channels() const { return p.depth - slab * kSlab; }
    __device__ int stage_units() const { return units_of(p, slab); }
  };

  // Of slab `slab`, the units of 16 bytes of channels that are multiplied.
  __device__ static int units_of(const WarpgroupParams& p, int slab) {
    return slab == p.slabs - 1 ? 2 * p.last_slices : Row::kUnits;
  }

  __device__ static unsigned char* wait_for_stage(const WarpgroupParams& p, Memory& memory, const Ring& ring) {
    mbarrier_wait(memory.empty[ring.slot], ring.parity ^ 1);
    return memory.stage(p, ring.slot);
  }
  __device__ static void give_stage(const WarpgroupParams& p, Memory& memory, Ring& ring) {
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(memory.stage_full[ring.slot]);
    ring.advance(p.stages);
  }

  __device__ static void stage_channels(const WarpgroupParams& p, Memory& memory, int warp) {
    if (threadIdx.x % kWarp) return;
    acquire_tensor_map(p.map);
    Ring ring;
    for (Slabs slabs(p); slabs.exists(); slabs.advance()) {
      unsigned char* stage = wait_for_stage(p, memory, ring);
      copy_channels(slabs, stage, memory.stage_full[ring.slot], warp, kStagerWarps);
      ring.advance(p.stages);
    }
  }

  // p.boxes boxes are under way, which may belong to later slabs, while one is turned around.
  template <Staging kStaging>
  __device__ static void stage_boxes(const WarpgroupParams& p, Memory& memory, int warp) {
    using OwnBox = Box<T, kSplit, kStaging>;
    BoxSource<OwnBox, Slabs> source(p, warp, kStagerWarps);
    BoxTurner<T, kSplit, kStaging> turner(p);
    BoxWalk walk(p, OwnBox::kSegment, warp, kStagerWarps);
    int64 left = source.slabs.count();
    int slab = 0;
    Ring ring, boxes;
#pragma unroll 1
    for (int i = 0; i < p.boxes; ++i)
      source.start(memory.box(p, warp, i), memory.box_place[warp][i], memory.box_full[warp][i]);
    for (; left > 0; --left) {
      unsigned char* stage = wait_for_stage(p, memory, ring);
      int units = units_of(p, slab);
#pragma unroll 1
      for (; walk.in_slab(); walk.advance()) {
        unsigned char* box = memory.box(p, warp, boxes.slot);
        Mbarrier& full = memory.box_full[warp][boxes.slot];
        BoxPlace& place = memory.box_place[warp][boxes.slot];
        mbarrier_wait(full, boxes.parity);
        turner.turn(box, place, stage, walk, units);
        __syncwarp();
        source.start(box, place, full);
        boxes.advance(p.boxes);
      }
      walk.next_slab();
      give_stage(p, memory, ring);
      if (++slab == p.slabs) slab = 0;
    }
  }

  __device__ static void stage_single_pixels(const WarpgroupParams& p, Memory& memory, int warp) {
    SinglePixels<T, kSplit, Slabs> pixels(p, warp, kStagerWarps);
    Ring ring;
    int slab = 0;
    for (int64 left = pixels.slabs.count(); left > 0; --left) {
      pixels.stage(wait_for_stage(p, memory, ring), units_of(p, slab));
      give_stage(p, memory, ring);
      if (++slab == p.slabs) slab = 0;
    }
  }

  __device__ static void stage_input(const WarpgroupParams& p, Memory& memory, int warp) {
    if (p.staging == kStageRows) {
      stage_boxes<kStageRows>(p, memory, warp);
    } else if (p.staging == kStageFlat) {
      stage_boxes<kStageFlat>(p, memory, warp);
    } else if (p.staging == kStageChannels) {
      if constexpr (kSplit)
        stage_boxes<kStageChannels>(p, memory, warp);
      else
        stage_channels(p, memory, warp);
    } else {
      stage_single_pixels(p, memory, warp);
    }
  }

  // A consumer's side of the rings: where its next weights and its tile's slabs are, whose turn it is, and what it has
  // read but not yet given back: a lane remembers which of `empty` it will arrive at, -1 for none.
  struct Reader {
    Memory& memory;
    int lane;
    Ring weights, tile, next_tile;
    int held = -1;
    int ready = 0;  // whether the next weights are known to be there
    int last_step;  // of a slab, the one after which the job's products end, -1 for none
    unsigned turn = 0;

    __device__ void give_back() {
      if (held >= 0) mbarrier_arrive(memory.empty[held]);
    }
    // The first consumer begins; after that, each one's turn ends the other one's wait.
    __device__ void wait_turn(int consumer) {
      mbarrier_wait(memory.turn[consumer], turn ^ (consumer == 0));
      turn ^= 1;
    }
    __device__ void pass_turn(int consumer) {
      if (lane == 0) mbarrier_arrive(memory.turn[consumer ^ 1]);
    }
  };

  // Where a pass begins and ends among the steps, and the displacements of its first taps: looked up once for all slabs
  // of a job. (With the ends of all phases here, too, the assembler serialises products.)
  struct Pass {
    int index, first, last, offsets[2 * kTapsTogether];

    __device__ Pass(const WarpgroupParams& p, int index)
        : index(index), first(uniform(p.first_step[index * kPhases])), last(p.first_step[(index + 1) * kPhases]) {
#pragma unroll
      for (int i = 0; i < 2 * kTapsTogether; ++i) offsets[i] = p.offset[first + i];
    }
    __device__ int end(const WarpgroupParams& p, int phase) const {
      return uniform(p.first_step[index * kPhases + phase + 1]);
    }
  };

  // What the products of the next taps begin with, across the phases of a pass: their slots of the ring, descriptors of
  // their weights and pixels, and the displacements of as many taps after these, which take long to look up.
  struct Taps {
    Ring ring;
    uint64 stage, slot_0, weights[kTapsTogether], pixels[kTapsTogether];
    int step, offsets[kTapsTogether];

    __device__ Taps(const WarpgroupParams& p, const Reader& reader, uint64 stage, const Pass& pass)
        : ring{uniform(reader.weights.slot), unsigned(uniform(int(reader.weights.parity)))},
          stage(uniform_descriptor(stage)),
          slot_0(matrix_descriptor(reader.memory.weights(p, 0))),
          step(uniform(pass.first)) {
      Ring next = ring;
#pragma unroll
      for (int i = 0; i < kTapsTogether; ++i, next.advance(p.weight_stages)) {
        weights[i] = of_slot(next.slot);
        pixels[i] = of(pass.offsets[i]);
        offsets[i] = pass.offsets[kTapsTogether + i];
      }
    }
    __device__ uint64 of(int offset) const { return advance_descriptor(stage, offset * kSwizzledRow); }
    __device__ uint64 of_slot(int slot) const { return advance_descriptor(slot_0, slot * kWeightBytes); }
    // From a shuffle, the compiler knows that the warp agrees on a descriptor, and forms those of a tap's instructions
    // by one addition each, in the registers from which they are read. It does not see it in what a loop carries.
    template <int kTaps>
    __device__ void make_uniform() {
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
        weights[i] = uniform_descriptor(weights[i]);
        pixels[i] = uniform_descriptor(pixels[i]);
      }
    }
  };

  // Product `index` of those that kTaps taps of kSlices instructions are: all taps by two parts, then by the next two.
  template <int kSlices, int kTaps, bool kAdd, int kRegisters>
  __device__ __forceinline__ static void multiply(const Taps& taps, int index, float (&sum)[kRegisters]) {
    int tap = index / kSlices % kTaps, bytes = index % kSlices * 32, parts = index / (kTaps * kSlices);
    int weights = bytes + (kSplit && parts == 1 ? Row::kLow : 0);
    int pixels = bytes + (kSplit && parts == 0 ? Row::kLow : 0);
    wgmma<Operand, kAdd>(sum, advance_descriptor(taps.weights[tap], weights),
                         advance_descriptor(taps.pixels[tap], pixels));
  }

  // Looks up what tap `i` of those after the next kTaps begins with, whose weights are in `slot`. Returns whether these
  // are there.
  template <int kTaps>
  __device__ __forceinline__ static bool look_up(const WarpgroupParams& p, Memory& memory, const Taps& taps, int i,
                                                 const Ring& slot, Taps& next) {
    constexpr int kKnown = kTapsTogether - kTaps;
    if (i == 0) {
      next.step += kTaps;
      next.ring = slot;
    }
    bool found = mbarrier_test(memory.weight_full[slot.slot], slot.parity);
    next.weights[i] = computed_descriptor(taps.of_slot(slot.slot));
    next.pixels[i] = i < kKnown ? taps.pixels[i + kTaps] : computed_descriptor(taps.of(taps.offsets[i - kKnown]));
    next.offsets[i] = i < kKnown ? taps.offsets[i + kTaps] : p.offset[taps.step + kTaps + kTapsTogether + i];
    return found;
  }

  // Of split floats, the sums of two taps.
  struct Run {
    float sum[kSplit ? kPixels / 2 : 1];
  };

  // The products of the next kTaps taps, each kSlices instructions of 32 bytes of channels, or three times as many.
  //
  // An instruction waits until the tensor cores take it, and they have room for no more than one or two. So what comes
  // after the last product of these taps and before the first one of the next is time in which they run dry: no more
  // than a few instructions, and only once for two taps. What the next taps need is looked up between the products of
  // these, a tap after a quarter of them and one after half, so that no pause between two is long, and without a branch
  // (the assembler closes a group of products at the end of a basic block by itself, and waiting for a number of groups
  // would count it). The taps' slots are given back when the next ones' products have been issued; those of split
  // floats, whose sums are waited for, at once.
  template <int kSlices, int kTaps>
  __device__ __forceinline__ static void multiply_taps(const WarpgroupParams& p, Reader& reader, Taps& taps,
                                                       float (&total)[kPixels / 2], Run& run, int consumer) {
    Memory& memory = reader.memory;
    if (!reader.ready) {
      Ring slot = taps.ring;
#pragma unroll
      for (int i = 0; i < kTaps; ++i, slot.advance(p.weight_stages))
        mbarrier_wait(memory.weight_full[slot.slot], slot.parity);
    }
    if (taps.step + kTaps == reader.last_step) reader.pass_turn(consumer);
    int slot_of_lane = taps.ring.slot + reader.lane;
    slot_of_lane -= slot_of_lane < p.weight_stages ? 0 : p.weight_stages;
    int held = reader.lane < kTaps ? kMaxStages + slot_of_lane : -1;
    Taps next = taps;
    Ring slot = taps.ring;
    bool found[kTapsTogether];
    wgmma_fence();
    constexpr int kCount = kTaps * kSlices * kProducts;
#pragma unroll
    for (int product = 0; product < kCount; ++product) {
      if constexpr (!kSplit)
        multiply<kSlices, kTaps, true>(taps, product, total);
      else if (product == 0)
        multiply<kSlices, kTaps, false>(taps, product, run.sum);
      else
        multiply<kSlices, kTaps, true>(taps, product, run.sum);
      if (product == 0) taps.template make_uniform<kTaps>();  // the first one does not wait for the shuffles
#pragma unroll
      for (int i = 0; i < kTapsTogether; ++i) {
        if ((i + 1) * kCount / (2 * kTapsTogether) != product) continue;
#pragma unroll
        for (int skipped = 0; skipped < (i == 0 ? kTaps : 1); ++skipped) slot.advance(p.weight_stages);
        found[i] = look_up<kTaps>(p, memory, taps, i, slot, next);
      }
    }
    wgmma_commit();
    // The second one may be of another phase or job, and late: then the next taps look again.
    reader.ready = 1;
#pragma unroll
    for (int i = 0; i < kTapsTogether; ++i) reader.ready &= found[i];
    taps = next;
    if constexpr (kSplit) {
      wgmma_wait<0>();
      pin(run.sum);
      if (held >= 0) mbarrier_arrive(memory.empty[held]);
#pragma unroll
      for (int i = 0; i < kPixels / 2; ++i) total[i] += run.sum[i];
    } else {
      wgmma_wait<1>();
      reader.give_back();
      reader.held = held;
    }
  }

  // The products of one slab for all phases of a pass.
  template <int kSlices>
  __device__ __forceinline__ static void multiply_slab(const WarpgroupParams& p, Reader& reader,
                                                       float (&sum)[kPhases][kPixels / 2], Run& run, uint64 stage,
                                                       const Pass& pass, int consumer) {
    Taps taps(p, reader, stage, pass);
#pragma unroll
    for (int i = 0; i < kPhases; ++i) {
      int end = pass.end(p, i);
#pragma unroll 1
      while (taps.step + kTapsTogether <= end)
        multiply_taps<kSlices, kTapsTogether>(p, reader, taps, sum[i], run, consumer);
      if (taps.step < end) multiply_taps<kSlices, 1>(p, reader, taps, sum[i], run, consumer);
    }
    reader.weights = taps.ring;
  }

  // The sums of one job. The turn is passed on before the last products, since it takes the next consumer some 600
  // cycles to begin; when the job's weights and slabs have been waited for, or that one could take the end of a slot's
  // round before its own for the end of its own.
  __device__ __forceinline__ static void accumulate(const WarpgroupParams& p, Reader& reader,
                                                    float (&sum)[kPhases][kPixels / 2], const Job& job,
                                                    bool give_stages_back) {
    Memory& memory = reader.memory;
    Ring stages = reader.tile;
    Pass pass(p, job.pass);
    bool has_steps = pass.first < pass.last;
    reader.ready = 0;
    Run run = {};
    // Only where the slot's round before cannot be the other consumer's, whose end this wait would take for its own.
    if (p.stages > p.slabs) mbarrier_wait(memory.stage_full[stages.slot], stages.parity);
    reader.wait_turn(job.consumer);
    for (int slab = 0; slab < p.slabs; ++slab) {
      // Through a shuffle, so that the compiler knows that the warp agrees: it would wait for every product otherwise.
      int slices = __shfl_sync(kFullMask, slab == p.slabs - 1 ? p.last_slices : kSlabSlices, 0);
      mbarrier_wait(memory.stage_full[stages.slot], stages.parity);
      reader.last_step = uniform(slab == p.slabs - 1 ? pass.last : -1);
      uint64 pixels = matrix_descriptor(memory.stage(p, stages.slot));
      if (slices == kSlabSlices)
        multiply_slab<kSlabSlices>(p, reader, sum, run, pixels, pass, job.consumer);
      else if (kSlabSlices > 2 && slices == 3)
        multiply_slab<3>(p, reader, sum, run, pixels, pass, job.consumer);
      else if (kSlabSlices > 2 && slices == 2)
        multiply_slab<2>(p, reader, sum, run, pixels, pass, job.consumer);
      else
        multiply_slab<1>(p, reader, sum, run, pixels, pass, job.consumer);
      if (give_stages_back && reader.lane == kTapsTogether) {  // those before it have the weights
        if (has_steps && !kSplit)
          reader.held = stages.slot;
        else
          mbarrier_arrive(memory.empty[stages.slot]);
      }
      stages.advance(p.stages);
    }
    if (!has_steps) reader.pass_turn(job.consumer);
    wgmma_wait<0>();
    reader.give_back();
    reader.held = -1;
#pragma unroll
    for (int i = 0; i < kPhases; ++i) pin(sum[i]);
  }

  __device__ __forceinline__ static void consume(const Params& params, Memory& memory, int consumer) {
    const WarpgroupParams& p = params.gather;
    Reader reader{memory, int(threadIdx.x % kWarp)};
    Ending ending(params.ending, p);
    bool once = resident(p);
    // Inlined, too, however large: see run().
    for_each(p, [&](const Job& job) __attribute__((always_inline)) {
      if (job.exists && (!once || job.first)) {
        if (job.consumer == consumer) reader.tile = reader.next_tile;
        reader.next_tile.skip(p.slabs, p.stages);
      }
      if (job.consumer != consumer) {
        if (job.exists) reader.weights.skip(steps_before(p, job.pass + 1) - steps_before(p, job.pass), p.weight_stages);
        return;
      }
      if (!job.exists) {
        reader.wait_turn(consumer);
        reader.pass_turn(consumer);
        return;
      }
      float sum[kPhases][kPixels / 2];
#pragma unroll
      for (int i = 0; i < kPhases; ++i) {
#pragma unroll
        for (int j = 0; j < kPixels / 2; ++j) sum[i][j] = 0;
        pin(sum[i]);
      }
      accumulate(p, reader, sum, job, !once || job.last);
      TilePlace tile = place(p, job.tile);
      int group = group_of(p, tile, job.unit);
      int first_row = (Ending::kAllRows ? job.unit % p.units : job.unit) * kRows;
      ending.template consume<WarpgroupGather>(memory.ending, sum, tile, job, group * p.rows, first_row);
    });
  }

  // Inlined, however large: products under way must not cross a call.
  __device__ __forceinline__ static void run(const Params& params) {
    RAWKERN_DYNAMIC_SHARED(Memory, memory);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kMaxStages; ++i) mbarrier_init(memory.stage_full[i], kStagerWarps);
      for (int i = 0; i < kMaxWeightStages; ++i) mbarrier_init(memory.weight_full[i], 1);
      for (int i = 0; i < kMaxStages + kMaxWeightStages; ++i) mbarrier_init(memory.empty[i], 4);
      for (int i = 0; i < kConsumers; ++i) mbarrier_init(memory.turn[i], 4);
      for (int i = 0; i < kStagerWarps * kMaxBoxes; ++i)
        mbarrier_init(memory.box_full[i / kMaxBoxes][i % kMaxBoxes], 1);
      mbarrier_fence_init();
    }
    __syncthreads();
    int warp = __shfl_sync(kFullMask, int(threadIdx.x / kWarp), 0);
    if (warp >= kConsumerWarps) {
      fewer_registers<kProducerRegisters>();
      if (warp == kConsumerWarps) {
        if (threadIdx.x % kWarp == 0) stream_weights(params.gather, memory);
      } else {
        stage_input(params.gather, memory, warp - kConsumerWarps - 1);
      }
    } else {
      more_registers<kConsumerRegisters>();
      consume(params, memory, warp / 4);
    }
  }
};

}  // namespace rawkern
