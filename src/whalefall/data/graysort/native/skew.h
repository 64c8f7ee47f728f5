// The 6 bytes that a skewed key may begin with, by the number of bits of the record's number
// (0-64). Constants of the record format: Sort Benchmark, gensort 1.5, option -s.
#pragma once
#include <cstdint>

namespace graysort {
constexpr int kSkewBytes = 6;
// clang-format off
constexpr uint64_t kSkewBinary[65] = {
    0x4a696d477261, 0x95e0e48262b3, 0x45979353dbed, 0x882a02c31536, 0x5c90ab38ae52, 0x72dc0ca51e33,
    0x10431af6a0d8, 0x5efc4abfaca2, 0x44f78c8b40bf, 0x84c0992f3b94, 0xb3e9689de16b, 0xf8f64263fd0b,
    0xda7a45a182de, 0x9b6b4825e251, 0xdc682a00647e, 0xf25bd15439d1, 0xf2fa42ed1872, 0x6a59451be8d0,
    0x2729b9771471, 0x879b2fb7bb35, 0x68d0cc3c1999, 0x27d80879d79e, 0xb0795011b782, 0x464fb84ab848,
    0x21f03ee8ac41, 0xe7961c0d827f, 0x84d904457a61, 0x5359d35da884, 0x4e385466525c, 0x870fa6459011,
    0xff00463adfc8, 0x89ca67c29c93, 0x755090c0177d, 0xeb4d81a5c9ea, 0x8a8568b3086f, 0x5da69a3d8667,
    0x6a974359eaab, 0x63b6044b8e78, 0x33414912cb67, 0x226df2b79c9b, 0x1e58396c599a, 0x4d676091dcfe,
    0xc98f259b150d, 0xa827dc9aff7e, 0x0696c9a1ba3b, 0x6d16e338d777, 0xac35a43ba662, 0x7ee1e4007163,
    0xa16b6fa9f1ea, 0x2cb7a1bb9362, 0x2f4b08267ce7, 0x86d192c54184, 0xf6e4143fdeaa, 0x458369e83cb9,
    0x6c15f70f8176, 0xc0b487026b7f, 0xae9031f87d14, 0x6b25dc59e09e, 0x88382362424b, 0xafb96f95d32b,
    0xc1d4fcf577db, 0xc68d66d18453, 0x74fe19dc5268, 0x8b6ae036713b, 0x33d5b5b15c70};
constexpr char kSkewAscii[65][kSkewBytes + 1] = {
    "AsfAGH", "~sHd0j", "uI^EYm", "Q)JN)R", "o4FoBk", "*}-Wz1", "0fssx}", "mz4VCN", "my+=5r",
    "5HA\\z%", "`PkXQ<", "GLSnlm", "swBzQ#", "9SC<z ", "o7~drs", "K~%q4]", "gj<m5S", "&~2Ch{",
    "B]az'~", ",2K,DK", "}[v>zy", "kXrG^e", "v%^RG^", "vi@>8j", "}dA7*<", ">Y$Kc)", "uF?T;*",
    "~%.@@,", "JPrAKc", "*i@lF3", "9UH>%F", "-^1~=a", ".\\KqT&", "9RtsPa", "Fqy~]O", "Wj-%?e",
    "Rv]QHo", "1 e!og", "N,gk>3", "s.72Y.", "j*0`gc", "R+Sh=K", "x]w]=D", "maU!Uo", "smN$i ",
    "T}# `9", "G2oMVH", "(tv1'>", "RE%Z{o", "'%:YY?", "N(JuG%", "`E$,xR", "jzu$Fn", "|xaPO\\",
    "GCU4gf", "JU9s03", "D@v9\"\"", "OffB8(", "-_) R'", "'z4P|n", "[!Nbx&", "p?\"\\\\6", "+2A^xP",
    "-cuJvy", "ix^T<S"};
// clang-format on
}  // namespace graysort
