// From the logits of one token to the id of the next: penalties, a mask of what a grammar allows, temperature,
// top-k, top-p, min-p and the draw. The same results as lexmill/inference/sampling.py, some ten times as fast:
// nothing is sorted that need not be.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr double kNever = -50;  // in nats below the best: what lies deeper is never drawn

struct Candidate {
  double score;  // (logit - best) / temperature
  int32_t id;
};

// The likelier first, of equals the one with the lower id, as a stable sort has it.
bool before(const Candidate& one, const Candidate& other) {
  return one.score != other.score ? one.score > other.score : one.id < other.id;
}

}  // namespace

extern "C" {

// What is asked, and at its end what was found. Mirrored by lexmill/inference/native/choosing.py.
struct LexmillChoice {
  const float* logits;      // (vocabulary)
  const uint32_t* allowed;  // a bit a token, (vocabulary + 31) / 32 words, or null: all are
  const int32_t* seen;      // the ids of the text so far, the `given` ones of the prompt first
  int64_t vocabulary, seen_count, given;
  double temperature, top_p, min_p, repetition, presence, frequency;
  int64_t top_k;
  double uniform;  // in [0, 1): decides the draw
  int64_t best;    // how many of the likeliest are told; 0: neither they nor `logprob`
  int32_t* best_ids;
  double* best_logprobs;
  double logprob;  // of the id that was chosen, by the logits as they came
};

// The id of the next token; -1 where nothing is allowed, -2 where a logit is no number.
int64_t lexmill_choose(LexmillChoice* choice);
}

namespace {

void penalise(const LexmillChoice& c, std::vector<float>& logits) {
  std::vector<int32_t> ids(c.seen, c.seen + c.seen_count);
  std::vector<int32_t> written(ids.begin() + c.given, ids.end());
  if (c.repetition != 1) {
    const float penalty = static_cast<float>(c.repetition);
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    for (int32_t id : ids) logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  }
  if (c.presence == 0 && c.frequency == 0) return;
  std::sort(written.begin(), written.end());
  for (size_t at = 0; at < written.size();) {
    const int32_t id = written[at];
    size_t end = at;
    while (end < written.size() && written[end] == id) ++end;
    logits[id] = static_cast<float>(logits[id] - (c.presence + c.frequency * static_cast<double>(end - at)));
    at = end;
  }
}

// Of the candidates those that top-k, top-p and min-p leave, with their weights as scores; in order of ids.
void filter(const LexmillChoice& c, std::vector<Candidate>& found) {
  bool ordered = true;
  if (c.top_k > 0 && static_cast<size_t>(c.top_k) < found.size()) {
    std::nth_element(found.begin(), found.begin() + (c.top_k - 1), found.end(), before);
    found.resize(c.top_k);
    ordered = false;
  }
  for (Candidate& one : found) one.score = std::exp(one.score);
  if (c.top_p < 1) {
    double total = 0;
    for (const Candidate& one : found) total += one.score;
    // as a rule a few hundred of them hold what is asked for: so many are put in order, then four times as many
    for (size_t count = 256;; count *= 4) {
      const size_t some = std::min(count, found.size());
      const auto end = found.begin() + static_cast<int64_t>(some);
      if (some < found.size()) std::nth_element(found.begin(), end - 1, found.end(), before);
      std::sort(found.begin(), end, before);
      double taken = 0;
      size_t kept = 0;
      while (kept < some && (kept == 0 || taken / total < c.top_p)) taken += found[kept++].score;
      if (kept == some && some < found.size()) continue;
      found.resize(kept);
      break;
    }
    ordered = false;
  }
  if (c.min_p > 0) {
    const auto few = [&](const Candidate& one) { return one.score < c.min_p && one.score < 1; };
    found.erase(std::remove_if(found.begin(), found.end(), few), found.end());
  }
  if (!ordered)
    std::sort(found.begin(), found.end(), [](const Candidate& one, const Candidate& other) { return one.id < other.id; });
}

int64_t draw(const LexmillChoice& c, const float* logits, double best) {
  static thread_local std::vector<Candidate> found;
  found.clear();
  for (int64_t id = 0; id < c.vocabulary; ++id) {
    const double score = (logits[id] - best) / c.temperature;
    if (score > kNever) found.push_back({score, static_cast<int32_t>(id)});
  }
  filter(c, found);
  double total = 0, taken = 0;
  for (const Candidate& one : found) total += one.score;
  for (const Candidate& one : found) {
    taken += one.score;
    if (taken > c.uniform * total) return one.id;
  }
  return found.back().id;
}

constexpr int64_t kBlock = 512, kLanes = 16;

// The highest logit, and that of each block; `sound` says whether all are numbers and none is plus infinity. The lanes
// are there so that the compiler may take vectors: one maximum after the other would wait for each comparison.
float highest(const float* logits, int64_t count, std::vector<float>& peaks, bool& sound) {
  constexpr float kLeast = -std::numeric_limits<float>::infinity(), kMost = std::numeric_limits<float>::max();
  peaks.clear();
  float best = kLeast;
  int32_t wrong = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = std::min(count, start + kBlock);
    float lanes[kLanes];
    int32_t bad[kLanes] = {};
    std::fill(lanes, lanes + kLanes, kLeast);
    int64_t at = start;
    for (; at + kLanes <= end; at += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float x = logits[at + lane];
        lanes[lane] = lanes[lane] < x ? x : lanes[lane];
        bad[lane] |= !(x <= kMost);
      }
    for (; at < end; ++at) {
      lanes[0] = lanes[0] < logits[at] ? logits[at] : lanes[0];
      wrong |= !(logits[at] <= kMost);
    }
    for (int32_t one : bad) wrong |= one;
    peaks.push_back(*std::max_element(lanes, lanes + kLanes));
    best = std::max(best, peaks.back());
  }
  sound = !wrong;
  return best;
}

int64_t first_of(const float* logits, int64_t count, float best, const std::vector<float>& peaks) {
  const int64_t start = (std::find(peaks.begin(), peaks.end(), best) - peaks.begin()) * kBlock;
  return std::find(logits + start, logits + std::min(count, start + kBlock), best) - logits;
}

// The likeliest ids with their log-probabilities, by the logits as they came.
void tell(LexmillChoice& c, int64_t chosen) {
  const float best = *std::max_element(c.logits, c.logits + c.vocabulary);
  double total = 0;
  for (int64_t id = 0; id < c.vocabulary; ++id) total += std::exp(static_cast<double>(c.logits[id]) - best);
  const double all = std::log(total) + best;
  std::vector<Candidate> ranked(c.vocabulary);
  for (int64_t id = 0; id < c.vocabulary; ++id) ranked[id] = {c.logits[id] - all, static_cast<int32_t>(id)};
  const auto end = ranked.begin() + std::min(c.best, c.vocabulary);
  std::partial_sort(ranked.begin(), end, ranked.end(), before);
  for (auto one = ranked.begin(); one != end; ++one) {
    c.best_ids[one - ranked.begin()] = one->id;
    c.best_logprobs[one - ranked.begin()] = one->score;
  }
  c.logprob = c.logits[chosen] - all;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int64_t lexmill_choose(LexmillChoice* choice) {
  LexmillChoice& c = *choice;
  static thread_local std::vector<float> changed;
  const float* logits = c.logits;
  const bool penalties = c.seen_count && (c.repetition != 1 || c.presence != 0 || c.frequency != 0);
  if (penalties || c.allowed) {
    changed.assign(c.logits, c.logits + c.vocabulary);
    if (penalties) penalise(c, changed);
    if (c.allowed)
      for (int64_t id = 0; id < c.vocabulary; ++id)
        if (!(c.allowed[id / 32] >> (id % 32) & 1)) changed[id] = -std::numeric_limits<float>::infinity();
    logits = changed.data();
  }
  static thread_local std::vector<float> peaks;
  bool sound = true;
  const float best = highest(logits, c.vocabulary, peaks, sound);
  if (!sound) return -2;
  if (best == -std::numeric_limits<float>::infinity()) return c.allowed ? -1 : -2;
  const int64_t chosen =
      c.temperature == 0 ? first_of(logits, c.vocabulary, best, peaks) : draw(c, logits, best);
  if (c.best) tell(c, chosen);
  return chosen;
}
