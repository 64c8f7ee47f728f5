// Calls that passed every check, by what they look like: the native struct of each, which of its
// words are addresses, and the results to be made.
#pragma once
#include "arrays.h"
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace wf::calls {
constexpr int64_t kMostBytes = 1024;  // of a native struct
constexpr size_t kMostPlans = 256;    // of a function; beyond it, the oldest goes
constexpr int kMostResults = 3;

// What fills a word of the struct.
enum From : int32_t { kArray = 0, kResult = 1, kWithin = 2 };
struct Patch {
  int32_t offset, from;
  int32_t which;  // array, result, or the offset within the struct that it points to
};

struct Plan {
  std::vector<int64_t> key;
  std::vector<int64_t> block;
  std::vector<Patch> patches;
  std::vector<Made> results;
  void* entry = nullptr;
  bool has_status = false;
};

// How a function's arguments are read, and its plans.
struct Table {
  std::string kinds;             // one letter an argument; see read_arguments
  std::vector<Object*> classes;  // of arguments 'o'; kept alive by Python
  int written = -1;              // the array that is written, of the arrays in order; -1: none
  int accumulator = -1;          // the one array that may be the written one itself
  int returns = -1;              // an array to give back; -1: the results, or True without any
  std::unordered_map<uint64_t, std::shared_ptr<Plan>> plans;
  std::vector<uint64_t> order;  // of arrival, round and round
  size_t next = 0;

  static uint64_t hash(const int64_t* words, int64_t count) {
    uint64_t sum = 0x9e3779b97f4a7c15u ^ uint64_t(count);
    for (int64_t i = 0; i < count; ++i) {
      sum = (sum ^ uint64_t(words[i])) * 0xff51afd7ed558ccdu;
      sum ^= sum >> 29;
    }
    return sum;
  }

  std::shared_ptr<Plan> find(const Key& key) const {
    auto found = plans.find(hash(key.words, key.count));
    if (found == plans.end()) return nullptr;
    const std::vector<int64_t>& kept = found->second->key;
    if (int64_t(kept.size()) != key.count ||
        std::memcmp(kept.data(), key.words, sizeof(int64_t) * kept.size()) != 0)
      return nullptr;
    return found->second;
  }

  void keep(std::shared_ptr<Plan> plan) {
    const uint64_t name = hash(plan->key.data(), int64_t(plan->key.size()));
    auto [place, is_new] = plans.insert_or_assign(name, std::move(plan));
    if (!is_new) return;
    if (order.size() < kMostPlans) {
      order.push_back(name);
      return;
    }
    plans.erase(std::exchange(order[next], name));
    next = (next + 1) % kMostPlans;
  }
};
}  // namespace wf::calls
