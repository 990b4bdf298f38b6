// Runs CUDA kernels, compiled as C++, on a CPU. A thread of a block is a fiber; blocks run one after the other, in any order, those of
// a cluster together.
//
// It looks for races by being unkind: which block comes next and which warp goes on is random, now and then one is held back for
// long, and copies and messages in flight land at any time and in any order. What they will overwrite is NaN from the moment they
// are issued, so a reader who is late, or early, sees NaN. A deadlock, a shuffle from a lane that has left, a misaligned vector, and
// a block that leaves copies in flight behind end the program.
//
// What it cannot show: memory that is less than sequentially consistent, registers, local memory, the rounding of the approximate
// instructions, time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// Of the device that the runtime describes; a process asks once.
inline const int architecture = std::getenv("EMULATED_ARCHITECTURE") ? std::atoi(std::getenv("EMULATED_ARCHITECTURE")) : 90;
// What its code was compiled for, 80, 90, 90a, ...: PTX of an older architecture runs too, without what that has not.
inline const std::string code = std::getenv("EMULATED_CODE") ? std::getenv("EMULATED_CODE")
                                : architecture == 90         ? "90a"
                                                             : std::to_string(architecture);
inline const int code_architecture = std::atoi(code.c_str());
inline const bool code_has_wgmma = code == "90a";
inline int cluster_launches = 0;  // so far

// EMULATED_SEED draws other schedules. EMULATED_LONG=1: tests repeat what depends on them, and take the combinations that they
// otherwise take by turns.
inline const int seed = std::getenv("EMULATED_SEED") ? std::atoi(std::getenv("EMULATED_SEED")) : 1;
inline const bool is_long = std::getenv("EMULATED_LONG") != nullptr;
inline int repetitions() { return is_long ? 10 : 1; }
inline std::mt19937 random{unsigned(seed)};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}
inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

// Instructions that not every code has.
inline void needs_sm90(const char* what) {
  if (code_architecture >= 90) return;
  std::fprintf(stderr, "emulator: code for sm_%s has no %s\n", code.c_str(), what);
  std::abort();
}

// ---- Threads

enum class Waiting { for_nothing, for_block, for_warp, for_some_of_block, for_cluster, for_phase };

struct Phases {  // an mbarrier
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;  // expected, or too early if negative
  uint32_t done = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  bool waited_for_launch;  // before this one
  Waiting waiting;
  uint64_t value;  // what the warp is shown, or the number of a barrier for some of the block, and for how many
  const uint64_t* barrier;
  uint32_t parity;
};

struct Flight {  // of a copy or a message
  char* to;
  const char* from;  // or, if null, the data
  std::vector<char> data;
  size_t bytes;
  const uint64_t* barrier;
};

inline std::vector<Fiber> fibers;
inline int current, block_threads, blocks_together;
inline ucontext_t scheduler;
inline dim3 first_block;
inline std::function<void()> kernel;
inline std::vector<std::vector<char>> shared_memory;
inline std::unordered_map<const uint64_t*, Phases> barriers;
inline std::vector<Flight> flights;
struct Shown {
  uint64_t value[32];
  bool present[32];
};
inline std::map<std::pair<int, uint64_t>, uint64_t> arrived;  // at a block's barriers for some of it, without waiting
inline std::vector<Shown> shown;                              // by the lanes of each warp, at their last collective

inline void become(int thread) {
  current = thread;
  const unsigned t = unsigned(thread % block_threads);
  threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
  blockIdx = first_block;
  blockIdx.x += unsigned(thread / block_threads);
}
inline void wait(Waiting waiting, uint64_t value = 0) {
  const int me = current;
  fibers[me].waiting = waiting;
  fibers[me].value = value;
  swapcontext(&fibers[me].context, &scheduler);
  become(me);
}
inline void sometimes_yield() {
  if (random() % 8 == 0) wait(Waiting::for_nothing);
}
inline void body_of_fiber() {
  kernel();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline int this_block() { return current / block_threads; }
inline char* memory_of(int block) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared_memory[block].data()) + 1023) / 1024 * 1024);
}
inline void* dynamic_shared() { return memory_of(this_block()); }
template <typename T>
T* in_block(T* mine, int block) {
  return reinterpret_cast<T*>(memory_of(block) + (reinterpret_cast<const char*>(mine) - memory_of(this_block())));
}

// ---- What threads of a warp show each other

inline const Shown& collective(uint64_t value) {
  const int warp = current / 32;
  wait(Waiting::for_warp, value);
  return shown[warp];
}
template <typename T>
T from_lane(T value, int lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  const Shown& all = collective(word);
  require(all.present[lane], "a shuffle from a lane that has left the kernel");
  std::memcpy(&value, &all.value[lane], sizeof value);
  return value;
}

// ---- Barriers that count bytes

inline bool is_over(const uint64_t* barrier, uint32_t parity) { return (barriers.at(barrier).done & 1) != (parity & 1); }
inline void settle(Phases& b) {
  require(b.missing >= 0, "more arrivals at a barrier than it expects");
  if (b.missing == 0 && b.bytes == 0) {
    b.done++;
    b.missing = b.arrivals;
  }
}
inline void arrive(const uint64_t* barrier, int64_t bytes = 0) {
  sometimes_yield();
  Phases& b = barriers.at(barrier);
  b.bytes += bytes;
  b.missing--;
  settle(b);
}
inline void wait_for_phase(const uint64_t* barrier, uint32_t parity) {
  while (!is_over(barrier, parity)) {
    fibers[current].barrier = barrier;
    fibers[current].parity = parity;
    wait(Waiting::for_phase);
  }
}
inline void depart(Flight flight) {
  std::memset(flight.to, 0xff, flight.bytes);
  flights.push_back(std::move(flight));
}
inline void land_one() {
  std::swap(flights[random() % flights.size()], flights.back());
  const Flight flight = std::move(flights.back());
  flights.pop_back();
  std::memcpy(flight.to, flight.from ? flight.from : flight.data.data(), flight.bytes);
  Phases& b = barriers.at(flight.barrier);
  b.bytes -= int64_t(flight.bytes);
  settle(b);
}

// ---- The scheduler

inline bool is_waiting(const Fiber& f, Waiting waiting) { return !f.done && f.waiting == waiting; }

// Lets go those of [begin, end) that wait for it, if `enough`.
inline bool release(int begin, int end, Waiting waiting, bool enough) {
  if (enough)
    for (int i = begin; i < end; i++)
      if (is_waiting(fibers[i], waiting)) fibers[i].waiting = Waiting::for_nothing;
  return enough;
}
// Whether all that are left of [begin, end), and at least one, wait for it.
inline bool all_wait(int begin, int end, Waiting waiting) {
  bool any = false;
  for (int i = begin; i < end; i++) {
    if (fibers[i].done) continue;
    if (fibers[i].waiting != waiting) return false;
    any = true;
  }
  return any;
}

inline bool run_warps() {
  // One warp is held back, or all of it but its first thread, which may act for the others. Now and then for so long that all others
  // come to wait for it.
  static int held_back, first_held, for_how_long;
  if (for_how_long-- <= 0) {
    held_back = int(random() % (fibers.size() / 32 + 1));
    first_held = int(random() % 2);
    for_how_long = int(random() % (random() % 4 ? 60 : 3000));
  }
  std::vector<int> warps;
  for (int w = 0; w * 32 < int(fibers.size()); w++) warps.push_back(w);
  std::shuffle(warps.begin(), warps.end(), random);
  bool ran = false;
  for (const bool only_held_back : {false, true}) {
    if (only_held_back && ran) break;
    for (int w : warps) {
      if (random() % 3 == 0) continue;
      for (int i = w * 32; i < std::min<int>(w * 32 + 32, int(fibers.size())); i++) {
        if ((w == held_back && i >= w * 32 + first_held) != only_held_back) continue;
        Fiber& f = fibers[i];
        if (is_waiting(f, Waiting::for_phase) && is_over(f.barrier, f.parity)) f.waiting = Waiting::for_nothing;
        if (!is_waiting(f, Waiting::for_nothing)) continue;
        become(i);
        swapcontext(&scheduler, &f.context);
        ran = true;
      }
      if (!flights.empty() && random() % 4 == 0) land_one();
    }
  }
  return ran;
}

inline void arrive_at_some(uint64_t barrier) {
  sometimes_yield();
  require(++arrived[{this_block(), barrier}] < uint32_t(barrier), "more arrivals at a barrier than it expects");
}
inline bool run_collectives() {
  bool ran = false;
  for (int begin = 0; begin < int(fibers.size()); begin += 32) {
    const int end = std::min<int>(begin + 32, int(fibers.size()));
    if (!all_wait(begin, end, Waiting::for_warp)) continue;
    for (int i = begin; i < end; i++) shown[begin / 32].present[i - begin] = !fibers[i].done;
    for (int i = begin; i < end; i++) shown[begin / 32].value[i - begin] = fibers[i].value;
    ran |= release(begin, end, Waiting::for_warp, true);
  }
  for (int b = 0; b < blocks_together; b++) {
    const int begin = b * block_threads, end = begin + block_threads;
    ran |= release(begin, end, Waiting::for_block, all_wait(begin, end, Waiting::for_block));
    std::unordered_map<uint64_t, uint64_t> there;  // by the barrier's number and how many threads it is for
    for (int i = begin; i < end; i++)
      if (is_waiting(fibers[i], Waiting::for_some_of_block)) there[fibers[i].value]++;
    for (const auto& [barrier, count] : there) {
      uint64_t& early = arrived[{b, barrier}];
      require(count + early <= uint32_t(barrier), "more arrivals at a barrier than it expects");
      if (count + early < uint32_t(barrier)) continue;
      early = 0;
      ran = true;
      for (int i = begin; i < end; i++)
        if (is_waiting(fibers[i], Waiting::for_some_of_block) && fibers[i].value == barrier)
          fibers[i].waiting = Waiting::for_nothing;
    }
  }
  const int all = int(fibers.size());
  return ran | release(0, all, Waiting::for_cluster, all_wait(0, all, Waiting::for_cluster));
}

inline void (*when_blocks_end)() = nullptr;

inline void run_together(int blocks, size_t shared_bytes) {
  blocks_together = blocks;
  fibers.resize(size_t(blocks) * block_threads);
  shown.assign(fibers.size() / 32 + 1, {});
  shared_memory.assign(blocks, std::vector<char>(shared_bytes + 2048, char(0xff)));
  barriers.clear();
  arrived.clear();
  for (Fiber& f : fibers) {
    f.done = f.waited_for_launch = false;
    f.waiting = Waiting::for_nothing;
    f.stack.resize(1 << 16);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, body_of_fiber, 0);
  }
  for (int idle = 0; !std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; });) {
    bool ran = run_warps();
    ran |= run_collectives();
    if (!ran && !flights.empty()) land_one(), ran = true;
    idle = ran ? 0 : idle + 1;
    require(idle < 100, "every thread waits for another");  // run_warps passes warps over at random
  }
  require(flights.empty(), "a block has left while its copies were in flight");
  if (when_blocks_end) when_blocks_end();
}

// kernel() of every thread of the grid.
inline void run(dim3 grid, dim3 block, size_t shared_bytes, int cluster, std::function<void()> body) {
  blockDim = block;
  gridDim = grid;
  block_threads = int(block.x * block.y * block.z);
  require(block_threads <= 1024 && block.z <= 64, "a block of too many threads");
  require(grid.y <= 65535 && grid.z <= 65535 && grid.x % unsigned(cluster) == 0, "a grid that cannot be");
  kernel = std::move(body);
  std::vector<dim3> first_blocks;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x += unsigned(cluster)) first_blocks.push_back(dim3(x, y, z));
  std::shuffle(first_blocks.begin(), first_blocks.end(), random);
  for (const dim3& first : first_blocks) {
    first_block = first;
    run_together(cluster, shared_bytes);
  }
}

}  // namespace emulator
