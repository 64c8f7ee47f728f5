// The names in a packed folder's tree, straight from its pickle: no object is made of any of them.
//   in   a pickle (protocol 4) of nested dicts, plain or ordered: name -> sample number or dict
//   out  a row for each name: where its bytes lie, how many, its sample or dict, its parent dict
// A small stack machine with just the opcodes that such a pickle has; anything else is not read
// here (the caller has Python's own machine). Bound: the first walk over the bytes.
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kMemo = 256;  // what BINGET can ask for
enum Kind : uint8_t { kMark, kClass, kTuple, kName, kNumber, kDict };

struct Item {
  Kind kind;
  int64_t value;  // of a name: where it begins
  int64_t bytes;  // of a name: its length
};

struct Rows {
  uint32_t* at;
  uint16_t* bytes;
  int32_t *sample, *parent;
  uint8_t* seen;  // [samples], to find one that is named twice
  int64_t room, samples, count = 0, files = 0;

  // Items [from, end) of the stack are names and values of a dict.
  bool add(const std::vector<Item>& stack, size_t from, int64_t dict) {
    for (size_t i = from; i + 1 < stack.size(); i += 2) {
      const Item &name = stack[i], &value = stack[i + 1];
      if (name.kind != kName || name.bytes > UINT16_MAX || count == room) return false;
      if (value.kind != kNumber && value.kind != kDict) return false;
      if (value.kind == kNumber) {
        if (value.value >= samples || seen[value.value]) return false;
        seen[value.value] = 1, ++files;
      }
      at[count] = static_cast<uint32_t>(name.value);
      bytes[count] = static_cast<uint16_t>(name.bytes);
      // A dict is told from a sample by its sign.
      sample[count] = static_cast<int32_t>(value.kind == kDict ? -1 - value.value : value.value);
      parent[count++] = static_cast<int32_t>(dict);
    }
    return (stack.size() - from) % 2 == 0;
  }
};

struct Reader {
  const uint8_t* data;
  int64_t size, at;

  bool has(int64_t count) const { return size - at >= count; }
  uint64_t number(int count) {
    uint64_t value = 0;
    for (int i = 0; i < count; ++i) value |= static_cast<uint64_t>(data[at + i]) << (8 * i);
    at += count;
    return value;
  }
};

}  // namespace

// Returns the number of rows, or -1 for a pickle of another kind, a damaged one, or one that does
// not name each of the samples once. The root is dict 0; `dicts` gets how many there are.
extern "C" __attribute__((visibility("default"))) int64_t
wf_record_names(const uint8_t* data, int64_t size, int64_t room, int64_t samples, uint32_t* at,
                uint16_t* bytes, int32_t* sample, int32_t* parent, uint8_t* seen, int64_t* dicts) {
  if (size > UINT32_MAX || samples > INT32_MAX) return -1;
  Reader in{data, size, 0};
  Rows rows{at, bytes, sample, parent, seen, room, samples};
  std::vector<Item> stack;
  Item memo[kMemo];
  int64_t made = 0, remembered = 0;
  while (in.has(1)) {
    const uint8_t code = in.data[in.at++];
    switch (code) {
      case 0x80:  // PROTO
        if (!in.has(1)) return -1;
        in.at += 1;
        break;
      case 0x95:  // FRAME
        if (!in.has(8)) return -1;
        in.at += 8;
        break;
      case 0x8c:   // SHORT_BINUNICODE
      case 'X': {  // BINUNICODE
        const int width = code == 'X' ? 4 : 1;
        if (!in.has(width)) return -1;
        const int64_t length = static_cast<int64_t>(in.number(width));
        if (!in.has(length)) return -1;
        stack.push_back({kName, in.at, length});
        in.at += length;
        break;
      }
      case 0x94:  // MEMOIZE
        if (stack.empty()) return -1;
        if (remembered < kMemo) memo[remembered] = stack.back();
        ++remembered;
        break;
      case 'h': {  // BINGET
        if (!in.has(1)) return -1;
        const int64_t index = static_cast<int64_t>(in.number(1));
        // The same dict twice would be two folders that are one.
        if (index >= remembered || memo[index].kind == kDict) return -1;
        stack.push_back(memo[index]);
        break;
      }
      case 0x93: {  // STACK_GLOBAL: the one class there is
        static const char module[] = "collections", name[] = "OrderedDict";
        if (stack.size() < 2) return -1;
        const Item &of = stack[stack.size() - 2], &what = stack.back();
        if (of.kind != kName || of.bytes != 11 || std::memcmp(data + of.value, module, 11) ||
            what.kind != kName || what.bytes != 11 || std::memcmp(data + what.value, name, 11))
          return -1;
        stack.resize(stack.size() - 2);
        stack.push_back({kClass, 0, 0});
        break;
      }
      case ')':  // EMPTY_TUPLE
        stack.push_back({kTuple, 0, 0});
        break;
      case 'R':  // REDUCE
        if (stack.size() < 2 || stack.back().kind != kTuple ||
            stack[stack.size() - 2].kind != kClass)
          return -1;
        stack.resize(stack.size() - 2);
        stack.push_back({kDict, made++, 0});
        break;
      case '}':  // EMPTY_DICT
        stack.push_back({kDict, made++, 0});
        break;
      case '(':  // MARK
        stack.push_back({kMark, 0, 0});
        break;
      case 'K':    // BININT1
      case 'M':    // BININT2
      case 'J': {  // BININT
        const int width = code == 'K' ? 1 : code == 'M' ? 2 : 4;
        if (!in.has(width)) return -1;
        const uint64_t value = in.number(width);
        if (value > INT32_MAX) return -1;  // negative
        stack.push_back({kNumber, static_cast<int64_t>(value), 0});
        break;
      }
      case 's':    // SETITEM
      case 'u': {  // SETITEMS
        size_t from = stack.size() - 2;
        if (code == 'u') {
          from = stack.size();
          while (from && stack[from - 1].kind != kMark) --from;
          if (!from) return -1;
        }
        const size_t below = code == 'u' ? from - 1 : from;
        if (stack.size() < 2 || below == 0 || below > stack.size()) return -1;
        if (stack[below - 1].kind != kDict) return -1;
        if (!rows.add(stack, from, stack[below - 1].value)) return -1;
        stack.resize(below);
        break;
      }
      case '.':  // STOP
        if (in.at != size || stack.size() != 1 || stack[0].kind != kDict || stack[0].value)
          return -1;
        *dicts = made;
        return rows.files == samples ? rows.count : -1;
      default:
        return -1;
    }
  }
  return -1;
}
