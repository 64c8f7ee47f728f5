// Products that do not wait for each other, as one list of tasks: one fork and join for all.
//
//   y[m] = x[m] . W^T        or, gated,        y[m] = silu(x[m] . W^T) * (x[m] . U^T)
//
// A task is a chunk of rows of one W (and the same rows of U) for all rows of x of its job; silu
// and the product happen while both lie in L1. Threads take runs of neighbouring tasks, and know
// what they read next, in the phase after this one too. Each output has one owner: neither threads
// nor what else is in the list change its bits.
#pragma once
#include <vector>
#include "linear.h"

namespace wf::gemm {
struct Job {
  const Weight* w;
  const Weight* up;  // null: a plain product
  Rows x;
  int64_t first, last;  // rows of x
  Output y;             // of a gated job: fp32, row m of x goes to row m
};

class Phase {
 public:
  void clear(int form) { form_ = form, jobs_.clear(), tasks_ = 0, bytes_ = 0; }
  void add(const Job& job);
  Job& job(int64_t i) { return jobs_[i]; }
  // Cuts the jobs into tasks.
  void cut();
  // `then`: the phase after, cut, of which only the weights need be there yet; or null.
  void run(const Phase* then) const;

 private:
  struct Cut : Job {
    int64_t chunk, first_task;
  };
  const Cut& job_of(int64_t task) const;
  Next weights(int64_t task) const;
  void gated(const Cut& job, int64_t n, Next next) const;
  void plain(const Cut& job, int64_t n, Next next) const;

  int form_ = kFew;
  int64_t tasks_ = 0, bytes_ = 0;
  std::vector<Cut> jobs_;
};

namespace phase {
// A task's bytes of W in the few form: each change of place costs what 1 to 2 KB do, and a thread
// waits for half a task on average; and outputs of its two products that are kept in L1.
constexpr int64_t kLeast = 32768, kMost = 262144, kKept = 4096;
// In the many form: rows of W of a task, and of x that are gated at once, for which W is decoded.
constexpr int64_t kManyChunk = kTile ? 128 : WF_ISA == 0 ? 256 : 64;
constexpr int64_t kManyRows = kTile ? many::kChunkRows : 64;
static_assert(kManyChunk <= many::kColumns && kManyRows <= many::kChunkRows);

// h = silu(g) * u
inline void silu_mul(const float* g, const float* u, float* h, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    vf v = load(g + i);
    store(h + i, v / (set1(1.0f) + exp(-v)) * load(u + i));
  }
  if (i == count) return;
  float a[kLanes] = {}, b[kLanes] = {}, c[kLanes];
  std::memcpy(a, g + i, (count - i) * 4);
  std::memcpy(b, u + i, (count - i) * 4);
  vf v = load(a);
  store(c, v / (set1(1.0f) + exp(-v)) * load(b));
  std::memcpy(h + i, c, (count - i) * 4);
}

// Rows [n, end) of w for the rows [first, last) of x; y's rows and columns are numbered as x's and
// w's, whatever part of them this is.
inline void multiply(const Weight& w, int64_t n, int64_t end, const Rows& x, int64_t first,
                     int64_t last, const Output& y, int form, Next next) {
  if (form == kMany) return multiply_many(w, n, end, x, first, last, y, next);
  Rows part = x;
  Output to = y;
  if (part.index)
    part.index += first;
  else if (part.halves)
    part.halves += first * part.pitch;
  else
    part.data += first * part.pitch;
  if (!part.index && part.scale) part.scale += first * part.scale_pitch;
  if (!part.index && part.unlift) part.unlift += first;
  part.tiles.first -= first;
  if (to.index)
    to.index += first;
  else
    to.data = static_cast<char*>(to.data) + first * to.pitch * kind_bytes(to.kind);
  multiply_few(w, n, end, part, last - first, to, next);
}
}  // namespace phase

inline void Phase::add(const Job& job) {
  jobs_.push_back({job, 0, 0});
  bytes_ += (job.up ? 2 : 1) * job.w->rows * job.w->cols * kind_bytes(job.w->kind);
}

inline void Phase::cut() {
  tasks_ = 0;
  int64_t most = bytes_ / (num_threads() * 4);
  most = most < phase::kLeast ? phase::kLeast : most > phase::kMost ? phase::kMost : most;
  for (Cut& job : jobs_) {
    const int64_t row = row_bytes(*job.w) * (job.up ? 2 : 1);
    job.chunk = form_ == kMany ? phase::kManyChunk : round_up(ceil_div(most, row), few::kBand);
    const int64_t kept = phase::kKept / few::kRowsOfX;
    if (job.up && job.chunk > kept) job.chunk = kept;
    job.first_task = tasks_;
    tasks_ += ceil_div(job.w->rows, job.chunk);
  }
}

inline const Phase::Cut& Phase::job_of(int64_t task) const {
  size_t low = 0, high = jobs_.size();
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    (jobs_[middle].first_task <= task ? low : high) = middle;
  }
  return jobs_[low];
}

inline Next Phase::weights(int64_t task) const {
  const Cut& job = job_of(task);
  return job.w->row((task - job.first_task) * job.chunk);
}

inline void Phase::run(const Phase* then) const {
  parallel_runs(tasks_, [&](int64_t task, int64_t next, const Run& run) {
    const Cut& job = job_of(task);
    const int64_t n = (task - job.first_task) * job.chunk;
    Next after = next >= 0 ? weights(next) : nullptr;
    if (!after && then && then->tasks_) after = then->weights(run.first_of(then->tasks_));
    job.up ? gated(job, n, after) : plain(job, n, after);
  });
}

inline void Phase::gated(const Cut& job, int64_t n, Next next) const {
  static thread_local Scratch kept;
  const int64_t step = form_ == kFew ? few::kRowsOfX : phase::kManyRows, chunk = job.chunk;
  const int64_t end = n + chunk < job.w->rows ? n + chunk : job.w->rows;
  float *gate = kept.get<float>(2 * step * chunk), *up = gate + step * chunk;
  for (int64_t first = job.first; first < job.last; first += step) {
    const int64_t last = first + step < job.last ? first + step : job.last;
    const Output g{gate - first * chunk - n, chunk, nullptr, nullptr, kF32, 0};
    const Output u{up - first * chunk - n, chunk, nullptr, nullptr, kF32, 0};
    phase::multiply(*job.w, n, end, job.x, first, last, g, form_, job.up->row(n));
    phase::multiply(*job.up, n, end, job.x, first, last, u, form_, next);
    for (int64_t i = first; i < last; ++i)
      phase::silu_mul(gate + (i - first) * chunk, up + (i - first) * chunk,
                      static_cast<float*>(job.y.data) + i * job.y.pitch + n, end - n);
  }
}

inline void Phase::plain(const Cut& job, int64_t n, Next next) const {
  const int64_t end = n + job.chunk < job.w->rows ? n + job.chunk : job.w->rows;
  for (int64_t first = job.first; first < job.last; first += many::kChunkRows) {
    const int64_t last = first + many::kChunkRows;
    phase::multiply(*job.w, n, end, job.x, first, last < job.last ? last : job.last, job.y, form_,
                    next);
  }
}
}  // namespace wf::gemm
