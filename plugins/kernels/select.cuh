// Exact top-k of one row of keys by one block of threads.
//
// Idea: the score pass leaves the maximum of every eight keys (an octet), and each thread folds the maxima it
// holds into one. The budget-th largest of these folded maxima, by a histogram, bounds the budget-th largest
// key from below; little more than `budget` octets reach that bound and are listed, one for each thread.
// Their keys, by another histogram, give the bin (3 % of a score wide) in which the exact threshold lies:
// what is above is chosen, and the few members of the bin are compared with each other. So a row of 128k
// tokens is read once, an eighth of it. Histograms count, so the order of their atomics does not show.
// Members that tie at 16 bits are scored again in float32, and ties there go to the lower position. Masses of
// equal scores take the slow path of select_slowly.cuh.
#pragma once

#include "candidates.cuh"
#include "select_slowly.cuh"

namespace fasa {

constexpr int kMaxMembers = 1024;  // of the bin of the threshold

struct alignas(16) SelectScratch {
    Histogram maxima, keys;
    BlockScratch block;
    Bin found;
    int narrow[kWarp];  // members by rank
    int ties;
    int token[kMaxMembers];
    float score[kMaxMembers];   // of ties
    uint16_t tie[kMaxMembers];  // members
    uint16_t rank[kMaxMembers];
    bool taken[kMaxMembers];
};

// Which of the keys of an octet lie above a range of ranks, and which in it.
struct RankRange {
    uint32_t lowest, beyond;

    __device__ uint32_t above(const uint4& eight) const { return hits(eight, twice(rank_key(beyond))); }
    __device__ uint32_t within(const uint4& eight) const {
        return hits(eight, twice(rank_key(lowest))) & ~above(eight);
    }
};

// Decides which of the members are chosen, `spare` of them (`taken`).
template <typename T>
__device__ void choose_members(SelectScratch& scratch, int members, int spare, const Rescorer<T>& rescore) {
    for (int m = threadIdx.x; m < members; m += kSelectThreads) {
        const uint32_t rank = scratch.rank[m];
        int higher = 0, equal = 0;
#pragma unroll 4
        for (int other = 0; other < members; ++other) {
            higher += scratch.rank[other] > rank;
            equal += scratch.rank[other] == rank;
        }
        scratch.taken[m] = higher + equal <= spare;
        if (higher < spare &&
            higher + equal > spare) {  // a tie at the threshold; their order does not matter
            scratch.tie[atomicAdd(&scratch.ties, 1)] = static_cast<uint16_t>(m);
            scratch.narrow[0] = spare - higher;  // how many of them are chosen: all write the same
        }
    }
    __syncthreads();
    const int ties = scratch.ties;
    if (ties == 0) {
        return;
    }
    for (int t = threadIdx.x / kWarp; t < ties; t += kSelectWarps) {
        const float score = rescore(scratch.token[scratch.tie[t]]);
        if (threadIdx.x % kWarp == 0) {
            scratch.score[t] = score;
        }
    }
    __syncthreads();
    for (int t = threadIdx.x; t < ties; t += kSelectThreads) {
        const float score = scratch.score[t];
        const int token = scratch.token[scratch.tie[t]];
        int better = 0;
        for (int other = 0; other < ties; ++other) {
            better += scratch.score[other] > score ||
                      (scratch.score[other] == score && scratch.token[scratch.tie[other]] < token);
        }
        scratch.taken[scratch.tie[t]] = better < scratch.narrow[0];
    }
    __syncthreads();
}

// Writes the `budget` tokens of a row with length > budget to `chosen` (shared memory), in a fixed order.
// octet_list: shared memory of octet_capacity(budget) ints.
template <typename T>
__device__ void select_tokens(const Scores& scores, const fasa_decode_params& p, int64_t row, int length,
                              const Rescorer<T>& rescore, SelectScratch& scratch, int* octet_list,
                              int* chosen) {
    int turn = 0;
    scratch.maxima.clear();
    scratch.keys.clear();
    if (threadIdx.x < kWarp) {
        scratch.narrow[threadIdx.x] = 0;
        scratch.ties = 0;
    }
    const auto* keys = reinterpret_cast<const uint4*>(scores.keys) + row * scores.octets;
    const int octets = (length + kOctet - 1) / kOctet;
    const bool all = octets <= octet_capacity(p.budget);
    int listed = octets;
    uint32_t floor = kLowest;
    if (!all) {
        Candidates candidates(scores, row, octets);
        __syncthreads();
        listed =
            candidates.list(p.budget, octet_list, scratch.maxima, scratch.block, scratch.found, turn, floor);
    }
    __syncthreads();
    // Thread t looks at every kSelectThreads-th listed octet; it keeps the keys of its first.
    const auto octet_at = [&](int i) { return all ? i : octet_list[i]; };
    uint4 kept = hidden_octet();
    if (threadIdx.x < listed && listed <= octet_capacity(p.budget)) {
        kept = keys[octet_at(threadIdx.x)];
    }
    const auto each = [&](auto visit) {
        for (int i = threadIdx.x; i < listed; i += kSelectThreads) {
            visit(i < kSelectThreads ? kept : keys[octet_at(i)], i);
        }
    };
    Bin bin{};
    RankRange range{};
    int packed = 0, total = 0, before = 0;  // keys above the range << kPacked | keys in it
    constexpr int kPacked = 19;
    const auto count = [&]() {
        packed = 0;
        each([&](const uint4& eight, int) {
            packed += __popc(range.above(eight)) << kPacked | __popc(range.within(eight));
        });
        before = block_scan(scratch.block, turn, packed, &total);
    };
    bool few = listed <= octet_capacity(p.budget);
    if (few) {
        each([&](const uint4& eight, int) {
            const uint32_t hit = hits(eight, twice(floor));
#pragma unroll
            for (int slot = 0; slot < kOctet; ++slot) {
                if (hit >> slot & 1) {
                    scratch.keys.add(octet_key(eight, slot));
                }
            }
        });
        __syncthreads();
        bin = locate(scratch.keys, p.budget, scratch.block, turn, scratch.found);
        range.lowest = static_cast<uint32_t>(bin.index) << Histogram::kShift;
        range.beyond = range.lowest + (1 << Histogram::kShift);
        count();
        if ((total & ((1 << kPacked) - 1)) >
            kMaxMembers) {  // the bin alone is too much: one rank of it, then
            each([&](const uint4& eight, int) {
                for (uint32_t hit = range.within(eight); hit; hit &= hit - 1) {
                    atomicAdd(&scratch.narrow[key_rank(octet_key(eight, __ffs(hit) - 1)) - range.lowest], 1);
                }
            });
            __syncthreads();
            const int lane = threadIdx.x % kWarp;
            int reached = scratch.narrow[kWarp - 1 - lane];  // lane 0 has the highest rank
            for (int step = 1; step < kWarp; step *= 2) {
                const int higher = __shfl_up_sync(0xffffffff, reached, step);
                reached += lane >= step ? higher : 0;
            }
            const uint32_t enough = __ballot_sync(0xffffffff, bin.above + reached >= p.budget);
            const int at = __ffs(enough) - 1;
            bin.above += at > 0 ? __shfl_sync(0xffffffff, reached, max(at - 1, 0)) : 0;
            range.lowest += kWarp - 1 - at;
            range.beyond = range.lowest + 1;
            count();
            few = (total & ((1 << kPacked) - 1)) <= kMaxMembers;
        }
    }
    if (!few) {
        select_slowly(scores, p, row, length, rescore, scratch.block, turn, chosen);
        return;
    }
    const int members = total & ((1 << kPacked) - 1);
    int place = before >> kPacked, member = before & ((1 << kPacked) - 1);
    if (packed) {
        each([&](const uint4& eight, int i) {
            const uint32_t above = range.above(eight), within = range.within(eight);
            const int first = octet_at(i) * kOctet;
#pragma unroll
            for (int slot = 0; slot < kOctet; ++slot) {
                if (above >> slot & 1) {
                    chosen[place++] = first + slot;
                } else if (within >> slot & 1) {
                    scratch.rank[member] = static_cast<uint16_t>(key_rank(octet_key(eight, slot)));
                    scratch.token[member++] = first + slot;
                }
            }
        });
    }
    __syncthreads();
    choose_members(scratch, members, p.budget - bin.above, rescore);
    // Members are few: one warp puts them behind the others.
    if (threadIdx.x < kWarp) {
        int to = bin.above;
        for (int first = 0; first < members; first += kWarp) {
            const int m = first + threadIdx.x;
            const bool take = m < members && scratch.taken[m];
            const uint32_t taken = __ballot_sync(0xffffffff, take);
            if (take) {
                chosen[to + __popc(taken & ((1u << threadIdx.x) - 1))] = scratch.token[m];
            }
            to += __popc(taken);
        }
    }
    __syncthreads();
}

}  // namespace fasa
