// The numbers of an attention page: unpacking, grouping into words, averaging, hiding special tokens.
// A map is {layers, heads, queries, keys, weights, rollout}; its weights are a Float32Array in the order
// layer, head, query, key. A matrix is {rows, columns, values}, row after row.
"use strict";

const held = JSON.parse(document.getElementById("attention-data").textContent);

function unpack(text, bits) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  if (bits === 16) return Float32Array.from(new Uint16Array(bytes.buffer), (whole) => whole / 65535);
  return Float32Array.from(bytes, (whole) => (whole / 255) ** 2);
}

// What the rows or columns of a map of tokens are: [{text, special, word}].
function tokensOf(side) {
  return side.tokens.map((text, index) => {
    const goesOn = index > 0 && side.word[index] === side.word[index - 1];
    return { text: goesOn ? "·" + text : text, special: !!side.special[index], word: side.word[index] };
  });
}

function wordsOf(side) {
  return side.words.map((text, word) => ({ text, special: !!side.special[side.word.indexOf(word)] }));
}

// Tokens to words: what a word's tokens receive is added up, where they look is averaged.
function grouped(values, queries, keys, rows, columns) {
  const size = queries.length * keys.length;
  const parts = new Array(rows).fill(0);
  for (const query of queries) parts[query.word]++;
  const out = new Float32Array((values.length / size) * rows * columns);
  for (let at = 0, base = 0; at < values.length; at += size, base += rows * columns) {
    for (let q = 0; q < queries.length; q++) {
      const row = base + queries[q].word * columns;
      const share = 1 / parts[queries[q].word];
      for (let k = 0; k < keys.length; k++) out[row + keys[k].word] += values[at + q * keys.length + k] * share;
    }
  }
  return out;
}

// Each map twice: {tokens, words}, the latter made when it is first asked for.
const levels = held.maps.map((map) => {
  const queries = tokensOf(map.queries);
  const keys = map.keys ? tokensOf(map.keys) : queries;
  const { kind, name, layers, heads, bits } = map;
  const text = map.queries.text;
  const shared = { kind, name, layers, heads, text, keyText: map.keys && map.keys.text, same: !map.keys };
  const tokens = {
    ...shared,
    queries,
    keys,
    weights: unpack(map.weights, bits),
    rollout: map.rollout && unpack(map.rollout, bits),
  };
  let words = null;
  const makeWords = () => {
    const rows = wordsOf(map.queries);
    const columns = map.keys ? wordsOf(map.keys) : rows;
    const group = (values) => values && grouped(values, queries, keys, rows.length, columns.length);
    return { ...shared, queries: rows, keys: columns, weights: group(tokens.weights), rollout: group(tokens.rollout) };
  };
  return { kind, name, tokens, get words() { return (words = words || makeWords()); } };
});

// One head's matrix; layer and head count from 1.
function headMatrix(map, layer, head) {
  const rows = map.queries.length;
  const columns = map.keys.length;
  const at = ((layer - 1) * map.heads + head - 1) * rows * columns;
  return { rows, columns, values: map.weights.subarray(at, at + rows * columns) };
}

// The mean, or with `most` the largest, of what layer and head (0: all) leave open.
function together(map, layer, head, most) {
  const rows = map.queries.length;
  const columns = map.keys.length;
  const values = new Float32Array(rows * columns);
  let count = 0;
  for (let l = layer || 1; l <= (layer || map.layers); l++) {
    for (let h = head || 1; h <= (head || map.heads); h++, count++) {
      const one = headMatrix(map, l, h).values;
      for (let i = 0; i < values.length; i++) values[i] = most ? Math.max(values[i], one[i]) : values[i] + one[i];
    }
  }
  if (!most) for (let i = 0; i < values.length; i++) values[i] /= count;
  return { rows, columns, values };
}

function shownOf(side, special) {
  const all = side.map((_, index) => index);
  const kept = all.filter((index) => special || !side[index].special);
  return kept.length ? kept : all;
}

// Only the shown rows and columns; `scaled` makes each row sum to 1 again. `hidden` is what was taken away.
function hide(matrix, queries, keys, scaled) {
  const values = new Float32Array(queries.length * keys.length);
  const hidden = new Float32Array(queries.length);
  queries.forEach((q, row) => {
    let sum = 0;
    keys.forEach((k, column) => {
      const weight = matrix.values[q * matrix.columns + k];
      values[row * keys.length + column] = weight;
      sum += weight;
    });
    hidden[row] = Math.min(1, Math.max(0, 1 - sum));
    if (scaled && sum > 1e-6) for (let c = 0; c < keys.length; c++) values[row * keys.length + c] /= sum;
  });
  return { rows: queries.length, columns: keys.length, values, hidden };
}

// The head by which a query looks most at a key: {layer, head, weight}, special tokens keeping their share.
function strongestHead(map, query, key) {
  let best = { layer: 1, head: 1, weight: -1 };
  for (let layer = 1; layer <= map.layers; layer++) {
    for (let head = 1; head <= map.heads; head++) {
      const weight = headMatrix(map, layer, head).values[query * map.keys.length + key];
      if (weight > best.weight) best = { layer, head, weight };
    }
  }
  return best;
}
