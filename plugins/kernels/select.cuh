// Exact top-k of one row of keys by one block of threads; the chosen tokens come out in ascending order.
//
// Idea: the score pass leaves the maximum of every eight keys. At least `budget` octets reach the budget-th
// largest maximum, so every chosen token lies in an octet that reaches it: one pass over L / 8 maxima, held
// in registers, leaves about `budget` octets, and the exact threshold is found among their keys, in registers
// again. Binary search over the 16 bits needs no atomics and so is deterministic. Tokens that tie at the
// threshold are scored again in float32, and ties there go to the lower position. Rows whose octets or ties
// overflow the lists below (masses of equal scores) take a slow path that reads all keys.
#pragma once

#include "block.cuh"
#include "rescore.cuh"

namespace fasa {

constexpr int kMaximaHeld =
    4;  // uint4 of octet maxima a thread keeps: 128k tokens a row; longer rows reread them
constexpr int kOctetsHeld = 2;         // candidate octets a thread keeps
constexpr uint32_t kAllRanks = 0x400;  // key_rank(kLowest): every token that exists
constexpr int kMaxTies = 1024;

// Candidate octets that the lists hold, for a budget.
__host__ __device__ inline int candidate_capacity(int budget) {
    return max(kOctetsHeld * kSelectThreads, 2 * budget);
}

struct SelectScratch {
    BlockScratch block;
    RescoreScratch rescore;
    int tie[kMaxTies];  // tokens, ascending
    float tie_score[kMaxTies];
    bool tie_taken[kMaxTies];
};

// The slow path: every pass reads the whole row. Writes `budget` tokens to `chosen`.
template <typename T>
__device__ void select_slowly(const Scores& scores, const fasa_decode_params& p, int64_t row, int length,
                              Rescorer<T>& rescore, SelectScratch& scratch, int& turn, int* chosen) {
    const uint16_t* keys = scores.keys + row * scores.octets * kOctet;
    const auto count_keys = [&](uint32_t rank) {
        int n = 0;
        for (int t = threadIdx.x; t < length; t += kSelectThreads) {
            n += key_rank(keys[t]) >= rank;
        }
        return n;
    };
    const Threshold found = search(scratch.block, turn, p.budget, p.budget, kAllRanks, length, count_keys);
    // Among the keys that tie, the float32 score that the last of the chosen has.
    uint32_t bar = 0;
    int spare = 0;  // ties at `bar` that still fit
    if (found.reached > p.budget) {
        const int above = block_sum(scratch.block, turn, count_keys(found.rank + 1));
        const auto count_ties = [&](uint32_t bound) {
            int n = 0;
            for (int t = threadIdx.x; t < length; t += kSelectThreads) {
                n += key_rank(keys[t]) == found.rank && float_rank(rescore(t)) >= bound;
            }
            return block_sum(scratch.block, turn, n);
        };
        uint32_t low = 0, high = 0xffffffff;
        while (high - low > 1) {
            const uint32_t middle = low + (high - low) / 2;
            (above + count_ties(middle) >= p.budget ? low : high) = middle;
        }
        bar = low;
        spare = p.budget - above - count_ties(bar + 1);
    }
    int written = 0, at_bar = 0;
    for (int first = 0; first < length; first += kSelectThreads) {
        const int t = first + threadIdx.x;
        const uint32_t rank = t < length ? key_rank(keys[t]) : 0;
        const bool tied = found.reached > p.budget && t < length && rank == found.rank;
        const uint32_t exact = tied ? float_rank(rescore(t)) : 0;
        const bool on_bar = tied && exact == bar;
        int total;
        const int before = at_bar + block_scan(scratch.block, turn, on_bar, &total);
        at_bar += total;
        const bool take =
            t < length && (tied ? exact > bar || (on_bar && before < spare) : rank >= found.rank);
        const int place = written + block_scan(scratch.block, turn, take, &total);
        written += total;
        if (take) {
            chosen[place] = t;
        }
    }
    __syncthreads();
}

// Writes the `budget` tokens of a row with length > budget to `chosen` (shared memory), ascending. rescore is
// prepared. octet_list: shared memory of candidate_capacity(budget) ints.
template <typename T>
__device__ void select_tokens(const Scores& scores, const fasa_decode_params& p, int64_t row, int length,
                              Rescorer<T>& rescore, SelectScratch& scratch, int* octet_list, int* chosen) {
    int turn = 0;
    const int octets = (length + kOctet - 1) / kOctet;
    const int capacity = candidate_capacity(p.budget);
    const auto* maxima = reinterpret_cast<const uint4*>(scores.maxima + row * scores.octets);
    const auto* keys = reinterpret_cast<const uint4*>(scores.keys) + row * scores.octets;
    int candidates = octets;
    Threshold floor{kAllRanks, length};
    if (octets > capacity) {
        // Thread t looks at the maxima [t * share, (t + 1) * share), in uint4 of eight.
        const int share = (octets + kSelectThreads * 8 - 1) / (kSelectThreads * 8);
        const int first = threadIdx.x * share;
        const auto load = [&](int i) {
            const int real = octets - (first + i) * 8;
            if (real >= 8) {
                return maxima[first + i];
            }
            uint4 eight = hidden_octet();  // the row's padding was never written
            for (int k = 0; k < real; ++k) {
                reinterpret_cast<uint16_t*>(&eight)[k] =
                    reinterpret_cast<const uint16_t*>(maxima + first + i)[k];
            }
            return eight;
        };
        uint4 held[kMaximaHeld];
#pragma unroll
        for (int i = 0; i < kMaximaHeld; ++i) {
            held[i] = i < share ? load(i) : hidden_octet();
        }
        const auto count = [&](uint32_t rank) {
            const __half2 bound = twice(rank_key(rank));
            __half2 n = __float2half2_rn(0.f);
#pragma unroll
            for (int i = 0; i < kMaximaHeld; ++i) {
                if (i < share) {
                    count_pairs(n, held[i], bound);
                }
            }
            for (int i = kMaximaHeld; i < share; ++i) {
                count_pairs(n, load(i), bound);
            }
            return total_of(n);
        };
        const int enough = max(kSelectThreads, 2 * p.budget);  // one octet a thread, if that is soon found
        floor = search(scratch.block, turn, p.budget, enough, kAllRanks, octets, count);
        if (floor.reached > capacity) {
            select_slowly(scores, p, row, length, rescore, scratch, turn, chosen);
            return;
        }
        const int mine = count(floor.rank);
        int place = block_scan(scratch.block, turn, mine, &candidates);
        const __half2 bound = twice(rank_key(floor.rank));
        const auto list = [&](const uint4& eight, int i) {
            for (uint32_t hit = hits(eight, bound); hit; hit &= hit - 1) {
                octet_list[place++] = (first + i) * 8 + __ffs(hit) - 1;
            }
        };
        if (mine) {
#pragma unroll
            for (int i = 0; i < kMaximaHeld; ++i) {
                if (i < share) {
                    list(held[i], i);
                }
            }
            for (int i = kMaximaHeld; i < share; ++i) {
                list(load(i), i);
            }
        }
        __syncthreads();
    }
    // Thread t looks at the candidates [t * share, (t + 1) * share).
    const bool all = octets <= capacity;
    const int share = (candidates + kSelectThreads - 1) / kSelectThreads;
    const int first = threadIdx.x * share;
    const auto octet_of = [&](int i) { return all ? first + i : octet_list[first + i]; };
    const auto load = [&](int i) { return first + i < candidates ? keys[octet_of(i)] : hidden_octet(); };
    uint4 held[kOctetsHeld];
#pragma unroll
    for (int i = 0; i < kOctetsHeld; ++i) {
        held[i] = i < share ? load(i) : hidden_octet();
    }
    const auto each = [&](auto visit) {
#pragma unroll
        for (int i = 0; i < kOctetsHeld; ++i) {
            if (i < share) {
                visit(held[i], i);
            }
        }
        for (int i = kOctetsHeld; i < share; ++i) {
            visit(load(i), i);
        }
    };
    const auto count = [&](uint32_t rank) {
        const __half2 bound = twice(rank_key(rank));
        __half2 n = __float2half2_rn(0.f);
        each([&](const uint4& eight, int) { count_pairs(n, eight, bound); });
        return total_of(n);
    };
    const int reached = block_sum(scratch.block, turn, count(floor.rank));
    const Threshold found = search(scratch.block, turn, p.budget, p.budget, floor.rank, reached, count);
    const __half2 at = twice(rank_key(found.rank)), over = twice(rank_key(found.rank + 1));
    const bool ties = found.reached > p.budget;
    const int above = ties ? count(found.rank + 1) : 0, tied = ties ? count(found.rank) - above : 0;
    int tie_place = 0, spare = 0;
    if (ties) {
        int total;
        tie_place = block_scan(scratch.block, turn, tied, &total);
        if (total > kMaxTies) {
            select_slowly(scores, p, row, length, rescore, scratch, turn, chosen);
            return;
        }
        spare = p.budget - (found.reached - total);
        if (tied) {
            int place = tie_place;
            each([&](const uint4& eight, int i) {
                for (uint32_t hit = hits(eight, at) & ~hits(eight, over); hit; hit &= hit - 1) {
                    scratch.tie[place++] = octet_of(i) * kOctet + __ffs(hit) - 1;
                }
            });
        }
        __syncthreads();
        for (int t = threadIdx.x; t < total; t += kSelectThreads) {
            scratch.tie_score[t] = rescore(scratch.tie[t]);
        }
        __syncthreads();
        for (int t = threadIdx.x; t < total; t += kSelectThreads) {
            int better = 0;
            for (int other = 0; other < total; ++other) {
                better += scratch.tie_score[other] > scratch.tie_score[t] ||
                          (scratch.tie_score[other] == scratch.tie_score[t] && other < t);
            }
            scratch.tie_taken[t] = better < spare;
        }
        __syncthreads();
    }
    int mine = ties ? above : count(found.rank);
    for (int t = tie_place; t < tie_place + tied; ++t) {
        mine += scratch.tie_taken[t];
    }
    int total;
    int place = block_scan(scratch.block, turn, mine, &total), tie = tie_place;
    if (mine) {
        each([&](const uint4& eight, int i) {
            const uint32_t sure = ties ? hits(eight, over) : 0;
            for (uint32_t hit = hits(eight, at); hit; hit &= hit - 1) {
                const bool tie_here = ties && !(sure & hit & -hit);
                if (!tie_here || scratch.tie_taken[tie++]) {
                    chosen[place++] = octet_of(i) * kOctet + __ffs(hit) - 1;
                }
            }
        });
    }
    __syncthreads();
}

}  // namespace fasa
