// Shares out the blocks of a call over the threads, and runs them.
//
// Work is what differs between paged, sparse and dense attention:
//   using Row;  kRows (R);  k_width(), v_width(), scale(), q(), q_type(), output()
//   blocks() -> std::vector<Block>;  queries(block, Query*) -> count, a multiple of R
//   source(block, scratch) -> an object with
//     fill(tile, n, Tile&)    addresses of the stored rows of keys 64 * tile … + n - 1
//     expand(Tile&)           where rows cannot be used as stored: addresses in `scratch`
// A block of much work is cut between runs; then its runs' results go through memory and are
// merged after all are there, in the order in which one thread would have merged them.
#pragma once
#include <algorithm>
#include <vector>
#include "whalefall/pool.h"
#include "block.h"

namespace wf::attention {
struct Block {
  int64_t token = 0, tokens = 0;  // query tokens
  int head = 0, heads = 0;
  int64_t index = 0;      // of the sequence or request, where Work wants one
  int64_t keys = 0;       // of the row that sees most
  int64_t run_tiles = 0;  // equal for all its rows
  int64_t rows = 0;       // with those that fill up groups

  int64_t tiles() const { return ceil_div(keys, kTile); }
  int64_t runs() const { return std::max<int64_t>(1, ceil_div(tiles(), run_tiles)); }
};

struct Task {
  int64_t block, first_run, end_run;
  float* partials;  // null: the block is this task's alone
  int64_t cost;
};

// A block whose runs are computed by several tasks; its results are [run][group].
struct Split {
  int64_t block;
  float* partials;
};

template <class Work>
class Runner {
  using Row = typename Work::Row;
  static constexpr int R = Work::kRows;
  using Result = Partial<R>;
  using Keys = TileOf<Row>;
  static constexpr int kKeys = Keys::kKeys;
  // Of a tile's scores; of a panel's weights in bf16.
  static constexpr int64_t kScoreFloats = kTiles<Row> ? kKeys * R / 2 : (kKeys + kPadding) * R;

 public:
  explicit Runner(const Work& work)
      : work_(work),
        k_steps_(ceil_div(work.k_width(), kStep)),
        v_steps_(ceil_div(work.v_width(), kStep)),
        q_floats_(k_steps_ * 2 * R * kLanes),
        result_floats_(Result::floats(v_steps_)) {}

  void run() {
    blocks_ = work_.blocks();
    share_out();
    parallel_for(int64_t(tasks_.size()), [&](int64_t i, int) { compute(tasks_[i]); });
    parallel_for(int64_t(splits_.size()), [&](int64_t i, int) { merge(splits_[i]); });
  }

 private:
  // Cuts what is more than its share into pieces of whole runs; hands out the longest first.
  void share_out() {
    int64_t total = 0, floats = 0;
    for (const Block& b : blocks_) total += cost(b, b.tiles());
    const int64_t limit = whole_blocks_suffice(total) ? total : total / (num_threads() * 4) + 1;
    for (int64_t i = 0; i < int64_t(blocks_.size()); ++i) {
      const Block& b = blocks_[i];
      int64_t step = b.runs();
      if (cost(b, b.tiles()) > limit) step = std::max<int64_t>(1, limit / cost(b, b.run_tiles));
      for (int64_t run = 0; run < b.runs(); run += step) {
        int64_t end = std::min(run + step, b.runs());
        int64_t tiles = std::min(end * b.run_tiles, b.tiles()) - run * b.run_tiles;
        tasks_.push_back({i, run, end, nullptr, cost(b, tiles)});
      }
      if (step < b.runs()) floats += b.runs() * b.rows / R * result_floats_;
    }
    static thread_local Arena arena;
    float* next = floats ? arena.floats(floats) : nullptr;
    for (Task& task : tasks_) {
      const Block& b = blocks_[task.block];
      if (task.end_run - task.first_run == b.runs()) continue;
      if (task.first_run == 0) {
        splits_.push_back({task.block, next});
        next += b.runs() * b.rows / R * result_floats_;
      }
      task.partials = splits_.back().partials;
    }
    if (tasks_.size() > 1)
      std::stable_sort(tasks_.begin(), tasks_.end(),
                       [](const Task& a, const Task& b) { return a.cost > b.cost; });
  }
  static int64_t cost(const Block& b, int64_t tiles) { return (tiles + 1) * b.rows; }

  // Whether uncut blocks, the longest first, keep all threads busy to within an eighth: cut ones
  // pay for partial results.
  bool whole_blocks_suffice(int64_t total) const {
    const int64_t threads = num_threads(), most = total / threads + total / threads / 8;
    if (threads == 1) return true;
    if (int64_t(blocks_.size()) < threads) return false;
    std::vector<int64_t> costs, busy(size_t(threads), 0);
    for (const Block& b : blocks_) costs.push_back(cost(b, b.tiles()));
    std::sort(costs.rbegin(), costs.rend());
    for (int64_t cost : costs) {
      int64_t& least = *std::min_element(busy.begin(), busy.end());
      if ((least += cost) > most) return false;
    }
    return true;
  }

  Result result(float* base, int64_t group) const { return {base + group * result_floats_}; }

  void compute(const Task& task) const {
    const Block& block = blocks_[task.block];
    static thread_local std::vector<Query> rows;
    rows.resize(size_t(block.rows));
    work_.queries(block, rows.data());
    const int64_t groups = block.rows / R, size = groups * result_floats_;
    static thread_local Arena arena;
    float* q = arena.floats(groups * (q_floats_ + kScoreFloats) + 2 * size);
    float* all = q + groups * (q_floats_ + kScoreFloats);
    float* last = all + size;
    auto source = work_.source(block);
    [[maybe_unused]] const TilesOf<Row> tiles;
    if (!kInOrder<R>) bring_first(block, task, source);
    for (int64_t g = 0; g < groups; ++g)
      pack_queries<Row, R>(work_.q(), work_.q_type(), &rows[g * R], work_.k_width(),
                           q + g * q_floats_);
    for (int64_t run = task.first_run; run < task.end_run; ++run) {
      float* to = task.partials ? task.partials + run * size : (run == 0 ? all : last);
      for (int64_t g = 0; g < groups; ++g) result(to, g).clear(v_steps_, !kTiles<Row>);
      add_run(block, run, task, rows.data(), source, q, to);
      if (!task.partials && run > 0) merge_run(block, run, rows.data(), all, last);
    }
    if (!task.partials) finish_all(block, rows.data(), all);
  }

  // Of a block's keys and of a run, in as many keys as are taken at once.
  static int64_t spans(const Block& block) { return ceil_div(block.keys, kKeys); }
  static int64_t run_spans(const Block& block) { return block.run_tiles / (kKeys / kTile); }

  template <class Source>
  static void fill(const Block& block, Source& source, int64_t tile, Keys& t) {
    t.n = int(std::min<int64_t>(kKeys, block.keys - tile * kKeys));
    source.fill(tile, t);
    for (int i = t.n; i < kKeys + kPadding; ++i) t.k[i] = t.k[t.n - 1], t.v[i] = t.v[t.n - 1];
  }

  // The first tile comes into L2 while queries are packed; each later one, while another is used.
  template <class Source>
  void bring_first(const Block& block, const Task& task, Source& source) const {
    const int64_t tile = task.first_run * run_spans(block);
    if (tile >= spans(block)) return;
    Keys first;
    fill(block, source, tile, first);
    Fetch k{first.k, first.n, source.k_bytes()}, v{first.v, first.n, source.v_bytes()};
    k.lines(first.n * ceil_div(source.k_bytes(), 64));
    if (first.k[0] != first.v[0]) v.lines(first.n * ceil_div(source.v_bytes(), 64));
  }

  // q: packed queries; behind them, memory for a tile's scores.
  template <class Source>
  void add_run(const Block& block, int64_t run, const Task& task, const Query* rows, Source& source,
               float* q, float* to) const {
    const float scale = work_.scale() * 1.44269504f;
    const int64_t end = std::min((run + 1) * run_spans(block), spans(block));
    const int64_t last = std::min(task.end_run * run_spans(block), spans(block)) - 1;
    static thread_local std::vector<Group<Row, R>> groups;
    groups.resize(size_t(block.rows / R));
    Keys tiles[2];
    const int64_t first = run * run_spans(block);
    if (first < end) fill(block, source, first, tiles[0]);
    for (int64_t tile = first; tile < end; ++tile) {
      Keys &now = tiles[(tile - first) & 1], &next = tiles[(tile - first + 1) & 1];
      const bool more = tile < last;  // in the next run, if not in this one
      if (more) fill(block, source, tile + 1, next);
      if (kInOrder<R> && more) std::copy_n(next.k, kPadding, now.k + now.n);
      source.expand(now);
      const int64_t used = gather(block, tile, rows, q, to, groups.data());
      if constexpr (kTiles<Row>) {
        Fetch bring;
        if (more) bring = {next.k, next.n, source.k_bytes()};
        attend_panel(now, bring, groups.data(), used, k_steps_, v_steps_, scale, tile == first);
      } else if (in_place(source)) {
        if constexpr (kInOrder<R>)
          for (int64_t g = 0; g < used; ++g) {
            // groups behind the first find the tile in L2
            const bool once = g || !drops_prefetches();
            auto* add = once ? attend_in_order<Row, R, 1> : attend_in_order<Row, R, kNumLeads>;
            add(now, groups[g].most, source.k_bytes(), groups[g].q, k_steps_, v_steps_, scale,
                groups[g].o, groups[g].state);
          }
      } else {
        const Ahead ahead{more ? &next : nullptr, source.k_bytes(), source.v_bytes(), used};
        attend<Row, R>(now, ahead, groups.data(), k_steps_, v_steps_, scale);
      }
      for (int64_t g = 0; g < used; ++g) Result{groups[g].o}.set(v_steps_, groups[g].state);
    }
  }
  template <class Source>
  static bool in_place(const Source& source) {
    if constexpr (kInOrder<R>)
      return source.in_place();
    else
      return false;
  }

  // The groups that see keys of a tile; how many.
  int64_t gather(const Block& block, int64_t tile, const Query* rows, float* q, float* to,
                 Group<Row, R>* groups) const {
    const int64_t all = block.rows / R;
    int64_t used = 0;
    for (int64_t g = 0; g < all; ++g, rows += R) {
      Group<Row, R>& group = groups[used];
      group.most = 0, group.least = kKeys;
      for (int r = 0; r < R; ++r) {
        const int64_t left = rows[r].keys - tile * kKeys;
        group.seen[r] = int(std::max<int64_t>(0, std::min<int64_t>(left, kKeys)));
        group.most = std::max(group.most, group.seen[r]);
        group.least = std::min(group.least, group.seen[r]);
      }
      if (group.most == 0) continue;
      const Result target = result(to, g);
      group.q = q + g * q_floats_;
      group.s = q + all * q_floats_ + used * kScoreFloats;
      group.o = target.o;
      group.state = target.softmax(v_steps_);
      ++used;
    }
    return used;
  }

  // Adds run `run` to those before it, for the groups that have keys in it.
  void merge_run(const Block& block, int64_t run, const Query* rows, float* all,
                 float* later) const {
    for (int64_t g = 0; g < block.rows / R; ++g) {
      int64_t keys = 0;
      for (int r = 0; r < R; ++r) keys = std::max(keys, rows[g * R + r].keys);
      if (keys > run * block.run_tiles * kTile) result(all, g).merge(v_steps_, result(later, g));
    }
  }
  void finish_all(const Block& block, const Query* rows, float* all) const {
    for (int64_t g = 0; g < block.rows / R; ++g)
      finish<Row, R>(result(all, g), rows + g * R, work_.v_width(), work_.output());
  }
  void merge(const Split& split) const {
    const Block& block = blocks_[split.block];
    float* all = split.partials;
    std::vector<Query> rows(size_t(block.rows));
    work_.queries(block, rows.data());
    for (int64_t run = 1; run < block.runs(); ++run)
      merge_run(block, run, rows.data(), all, all + run * (block.rows / R) * result_floats_);
    finish_all(block, rows.data(), all);
  }

  const Work& work_;
  const int64_t k_steps_, v_steps_, q_floats_, result_floats_;
  std::vector<Block> blocks_;
  std::vector<Task> tasks_;
  std::vector<Split> splits_;
};
}  // namespace wf::attention
