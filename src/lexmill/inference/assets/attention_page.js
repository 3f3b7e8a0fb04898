// What an attention page shows and how it is used. The numbers come from attention_data.js.
"use strict";

const element = (id) => document.getElementById(id);
const state = { ...held.start, query: 0, pinned: 0 };
let map, queries, keys, matrix; // what is shown: a map, the indices of its shown rows and columns, their weights

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "text", "rect", "title"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const percent = (weight) => (weight >= 0.0995 || weight === 0 ? Math.round(weight * 100) : (weight * 100).toFixed(1)) + "\u00a0%";
const nameOf = (piece) => (piece.special ? piece.text : `“${piece.text}”`);
const queryAt = (row) => map.queries[queries[row]];
const keyAt = (column) => map.keys[keys[column]];
const weightAt = (row, column) => matrix.values[row * matrix.columns + column];
const isItself = (row, column) => map.same && queries[row] === keys[column];

function ranked(row) {
  return keys.map((_, column) => ({ column, weight: weightAt(row, column) })).sort((a, b) => b.weight - a.weight);
}

// ---------------------------------------------------------------- from the state to what is shown

function refresh() {
  const level = levels.find((one) => one.kind === state.part) || levels[0];
  state.part = level.kind;
  map = state.tokens ? level.tokens : level.words;
  if (state.view === "rollout" && !map.rollout) state.view = "mean";
  state.layer = state.view === "rollout" ? 0 : Math.min(Math.max(0, state.layer | 0), map.layers);
  state.head = state.view === "mean" && state.layer ? Math.min(Math.max(0, state.head | 0), map.heads) : 0;
  queries = shownOf(map.queries, state.special);
  keys = shownOf(map.keys, state.special);
  const whole =
    state.view === "rollout"
      ? { rows: map.queries.length, columns: map.keys.length, values: map.rollout }
      : together(map, state.layer, state.head, state.view === "strongest");
  matrix = hide(whole, queries, keys, state.view !== "strongest" && !state.special);
}

function viewName() {
  if (state.view === "rollout") return "rollout through all layers";
  const where = state.layer ? `layer ${state.layer}` : "all layers";
  if (state.view === "strongest") return `strongest head of ${where}`;
  return state.head ? `${where}, head ${state.head}` : `${where}, mean of all heads`;
}

function drawAll() {
  const word = map && queryAt(state.pinned);
  refresh();
  if (word && map.queries[queries[state.pinned]] !== word) state.pinned = placeOf(word.text, 1);
  state.pinned = Math.max(0, Math.min(state.pinned, queries.length - 1));
  state.query = state.pinned;
  fillControls();
  const cut = (text) => (text.length > 200 ? text.slice(0, 200) + "…" : text);
  element("text").textContent = map.same ? cut(map.text) : `${cut(map.text)} → ${cut(map.keyText)}`;
  drawSentence();
  drawLines();
  drawMatrix();
  drawGrid();
  drawQuery();
  remember();
}

function placeOf(text, nth) {
  const wanted = text.toLowerCase().replace(/^·/, "");
  const found = queries.map((_, row) => row).filter((row) => queryAt(row).text.toLowerCase() === wanted);
  return found[Math.min(nth, found.length) - 1] ?? firstChoice();
}

// Without a chosen word: the one with the strongest link to another one; among words of four letters or more if
// there are such, since "of" and "the" look at their neighbours in any text.
function firstChoice() {
  const long = (piece) => piece.text.length > 3;
  let best = { row: 0, score: -1 };
  for (let row = 0; row < matrix.rows; row++) {
    for (let column = 0; column < matrix.columns; column++) {
      if (isItself(row, column)) continue;
      const score = weightAt(row, column) + (long(queryAt(row)) ? 2 : 0) + (long(keyAt(column)) ? 2 : 0);
      if (score > best.score) best = { row, score };
    }
  }
  return best.row;
}

function choose(row, pin) {
  if (pin) state.pinned = row;
  if (state.query !== row) {
    state.query = row;
    drawQuery();
  }
  if (pin) remember();
}

// ---------------------------------------------------------------- the parts that follow the chosen word

function drawQuery() {
  const row = state.query;
  const word = queryAt(row);
  const list = ranked(row);
  const most = Math.max(list[0].weight, 1e-6);

  const said = list.slice(0, 2).map(({ column, weight }) => {
    const target = isItself(row, column) ? make("b", {}, "itself") : make("b", {}, nameOf(keyAt(column)));
    return make("span", {}, target, ` (${percent(weight)})`);
  });
  element("answer").replaceChildren(`${nameOf(word)} looks most at `, said[0], ...(said[1] ? [", then at ", said[1]] : []), ".");
  const hidden = matrix.hidden[row];
  const counted = state.view === "strongest"
    ? "For each pair the head that links it most; the figures do not add up to 100 %."
    : hidden >= 0.005 && !state.special
      ? `Special tokens take ${percent(hidden)} of what ${nameOf(word)} gives; they are hidden, and the rest counts as 100 %.`
      : "";
  element("share").textContent = `Shown: ${viewName()}. ${counted}`;

  paintChips(row, most);
  paintLines(row, most);
  element("list-title").textContent = `Where ${nameOf(word)} looks`;
  element("looks").replaceChildren(
    ...list.slice(0, 10).map(({ column, weight }) => {
      const best = strongestHead(map, queries[row], keys[column]);
      const open = make("button", { type: "button", class: "link" }, `layer ${best.layer}, head ${best.head}: ${percent(best.weight)}`);
      open.addEventListener("click", () => show({ view: "mean", layer: best.layer, head: best.head }));
      const bar = make("i", { style: `width:${((100 * weight) / most).toFixed(1)}%`, "aria-hidden": "true" });
      return make(
        "li", {},
        make("span", { class: "what" }, make("b", {}, keyAt(column).text), isItself(row, column) ? " (itself)" : ""),
        make("span", { class: "number" }, percent(weight)),
        make("span", { class: "bar" }, bar),
        make("span", { class: "best" }, "strongest head: ", open)
      );
    })
  );
  for (const line of element("matrix").querySelectorAll("tr.chosen")) line.classList.remove("chosen");
  element("matrix").tBodies[0].rows[row].classList.add("chosen");
  markGrid(row);
}

function drawSentence() {
  element("sentence-note").textContent = map.same
    ? "Point at a word or step to it with Tab: the words that it looks at darken, with their share below."
    : "Point at a word of the target, or step to it with Tab: the words of the source that it looks at darken.";
  element("sentence").replaceChildren(
    ...queries.map((_, row) => {
      const chip = make("button", { type: "button", class: "chip", "aria-pressed": "false" }, make("b", {}, queryAt(row).text));
      if (map.same) chip.append(make("small", {}));
      chip.addEventListener("mouseenter", () => choose(row, false));
      chip.addEventListener("focus", () => choose(row, true));
      chip.addEventListener("click", () => choose(row, true));
      return chip;
    })
  );
  element("targets").hidden = map.same;
  element("targets").replaceChildren(
    ...(map.same ? [] : keys.map((_, column) => make("span", { class: "chip" }, make("b", {}, keyAt(column).text), make("small", {}))))
  );
}

function paintChips(row, most) {
  const chips = element("sentence").children;
  for (let index = 0; index < chips.length; index++) chips[index].setAttribute("aria-pressed", String(index === row));
  const targets = map.same ? chips : element("targets").children;
  for (let column = 0; column < keys.length; column++) {
    const chip = targets[column];
    const weight = weightAt(row, column);
    // steeper than the weight, so that the first choice stands out; the number says the truth
    chip.style.setProperty("--share", `${Math.round(55 * (weight / most) ** 1.5)}%`);
    chip.classList.toggle("strong", weight >= most);
    chip.querySelector("small").textContent = percent(weight);
    chip.setAttribute("aria-label", `${keyAt(column).text}: ${percent(weight)} of ${queryAt(row).text}`);
  }
}

const ROW = 28;

function drawLines() {
  const width = Math.min(640, Math.max(300, element("lines").clientWidth || 560));
  const [from, to] = [width * 0.34, width * 0.62];
  const height = ROW * Math.max(queries.length, keys.length) + 8;
  const cut = (text, pixels) => {
    const room = Math.floor(pixels / 8.5);
    return text.length > room ? text.slice(0, room - 1) + "…" : text;
  };
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
  const middle = (index) => ROW * index + ROW / 2 + 4;
  queries.forEach((_, row) => {
    keys.forEach((_, column) => {
      const bend = (to - from) / 2;
      const curve = `M${from} ${middle(row)}C${from + bend} ${middle(row)} ${to - bend} ${middle(column)} ${to} ${middle(column)}`;
      if (weightAt(row, column) > 0.02) svg.append(make("path", { d: curve, class: "line", "data-row": row, "data-column": column }));
    });
  });
  queries.forEach((_, row) => {
    const zone = make("rect", { x: 0, y: middle(row) - ROW / 2, width: from, height: ROW, class: "zone" });
    zone.addEventListener("mouseenter", () => choose(row, false));
    zone.addEventListener("click", () => choose(row, true));
    svg.append(make("text", { x: from - 8, y: middle(row) + 5, "text-anchor": "end", class: "from" }, cut(queryAt(row).text, from - 8)), zone);
  });
  keys.forEach((_, column) => svg.append(make("text", { x: to + 8, y: middle(column) + 5, class: "to" }, cut(keyAt(column).text, width - to - 56))));
  keys.forEach((_, column) => svg.append(make("text", { x: width - 4, y: middle(column) + 5, class: "number", "text-anchor": "end" })));
  element("lines").replaceChildren(svg);
}

function paintLines(row, most) {
  const svg = element("lines").firstChild;
  for (const line of svg.querySelectorAll("path")) {
    const mine = Number(line.dataset.row) === row;
    const weight = weightAt(Number(line.dataset.row), Number(line.dataset.column));
    line.classList.toggle("mine", mine);
    line.style.strokeWidth = mine ? 1 + (9 * weight) / most : 1;
    line.style.opacity = mine ? 0.15 + (0.85 * weight) / most : 0.5 * Math.min(1, weight);
    if (mine && svg.lastMine !== row) svg.insertBefore(line, svg.querySelector("text, rect"));
  }
  svg.querySelectorAll("text.from").forEach((text, index) => text.classList.toggle("chosen", index === row));
  svg.querySelectorAll("text.to").forEach((text, column) => text.classList.toggle("chosen", weightAt(row, column) >= most));
  svg.querySelectorAll("text.number").forEach((text, column) => (text.textContent = percent(weightAt(row, column))));
}

// ---------------------------------------------------------------- matrix and grid

function drawMatrix() {
  const numbers = keys.length <= 24;
  const most = Math.max(...matrix.values, 1e-6);
  const head = make("tr", {}, make("td", {}));
  keys.forEach((_, column) => head.append(make("th", { scope: "col" }, make("span", {}, keyAt(column).text))));
  const body = make("tbody");
  queries.forEach((_, row) => {
    const line = make("tr", {}, make("th", { scope: "row" }, queryAt(row).text));
    keys.forEach((_, column) => {
      const weight = weightAt(row, column);
      const shade = Math.round((100 * weight) / most);
      const cell = make("td", {
        style: `--shade:${shade}%`,
        title: `${queryAt(row).text} → ${keyAt(column).text}: ${percent(weight)}`,
      });
      if (shade > 68) cell.className = "dark";
      if (numbers) cell.textContent = Math.round(weight * 100);
      line.append(cell);
    });
    line.addEventListener("click", () => choose(row, true));
    body.append(line);
  });
  element("matrix").className = numbers ? "matrix" : "matrix dense";
  element("matrix").replaceChildren(make("thead", {}, head), body);
  element("matrix-note").textContent = `Shown: ${viewName()}. A click on a row chooses its word.`;
}

function accent() {
  const probe = make("i", { style: "color:var(--accent)" });
  document.body.append(probe);
  const parts = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
  probe.remove();
  return parts;
}

function drawGrid() {
  const color = accent();
  const key = [state.part, state.special, state.tokens, color].join();
  for (const button of element("grid").querySelectorAll("button")) markOpen(button);
  if (element("grid").key === key) return;
  element("grid").key = key;
  const [red, green, blue] = color;
  element("grid-note").textContent =
    "Each square is one head: rows look at columns. The line below it says where the chosen word looks most by that head" +
    (state.special ? "." : "; a pale square is a head that looks at special tokens, which are hidden.") +
    " Choose one to open it.";
  const parts = [];
  for (let layer = 1; layer <= map.layers; layer++) {
    const row = make("div", { class: "heads", role: "group", "aria-label": `layer ${layer}` });
    for (let head = 1; head <= map.heads; head++) {
      const one = hide(headMatrix(map, layer, head), queries, keys, false);
      const canvas = make("canvas", { width: one.columns, height: one.rows, "aria-hidden": "true" });
      const pen = canvas.getContext("2d");
      const image = pen.createImageData(one.columns, one.rows);
      one.values.forEach((weight, i) => image.data.set([red, green, blue, Math.round(255 * weight)], 4 * i));
      pen.putImageData(image, 0, 0);
      const mark = make("i", { class: "mark" });
      const button = make("button", { type: "button" }, make("span", { class: "square" }, canvas, mark), make("small", {}));
      button.matrix = one;
      button.name = `layer ${layer}, head ${head}`;
      button.layer = layer;
      button.head = head;
      markOpen(button);
      button.addEventListener("click", () => show({ view: "mean", layer, head }));
      row.append(button);
    }
    parts.push(make("h3", {}, `Layer ${layer}`), row);
  }
  element("grid").replaceChildren(...parts);
}

function markOpen(button) {
  const open = state.view === "mean" && state.layer === button.layer && state.head === button.head;
  button.setAttribute("aria-pressed", String(open));
}

function markGrid(row) {
  for (const button of element("grid").querySelectorAll("button")) {
    const one = button.matrix;
    const weights = one.values.subarray(row * one.columns, (row + 1) * one.columns);
    const column = weights.indexOf(Math.max(...weights));
    const mark = button.querySelector(".mark");
    mark.style.top = `${(100 * row) / one.rows}%`;
    mark.style.height = `${100 / one.rows}%`;
    const target = keyAt(column).text;
    button.querySelector("small").replaceChildren(
      make("b", {}, String(button.head)),
      make("span", {}, target),
      String(Math.round(weights[column] * 100))
    );
    button.setAttribute("aria-label", `${button.name}: ${queryAt(row).text} looks most at ${target}, ${percent(weights[column])}`);
    button.title = button.getAttribute("aria-label");
    button.classList.toggle("faint", weights[column] < 0.2);
  }
}

// ---------------------------------------------------------------- controls and address

function options(select, names, value) {
  select.replaceChildren(...names.map((name, index) => make("option", { value: index }, name)));
  select.value = String(value);
}

function fillControls() {
  const count = (number) => Array.from({ length: number }, (_, index) => String(index + 1));
  element("part-label").hidden = levels.length < 2;
  options(element("part"), levels.map((one) => one.name), levels.findIndex((one) => one.kind === state.part));
  element("view").value = state.view;
  element("view").querySelector("[value=rollout]").disabled = !map.rollout;
  options(element("layer"), ["all", ...count(map.layers)], state.layer);
  options(element("head"), ["mean of all", ...count(map.heads)], state.head);
  element("layer").disabled = state.view === "rollout";
  element("head").disabled = state.view !== "mean" || !state.layer;
  element("special").checked = state.special;
  element("tokens").checked = state.tokens;
}

function show(change) {
  Object.assign(state, change);
  drawAll();
}

function remember() {
  const word = queryAt(state.pinned).text.replace(/^·/, "");
  const nth = queries.slice(0, state.pinned + 1).filter((_, row) => queryAt(row).text === queryAt(state.pinned).text).length;
  const values = { word };
  if (nth > 1) values.nth = nth;
  if (levels.length > 1) values.part = state.part;
  if (state.view !== "mean") values.view = state.view;
  if (state.layer) values.layer = state.layer;
  if (state.head) values.head = state.head;
  if (state.special) values.special = 1;
  if (state.tokens) values.tokens = 1;
  try {
    history.replaceState(null, "", "#" + new URLSearchParams(values));
  } catch {
    // some viewers forbid it; then the address stays as it was
  }
}

function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (!location.hash) return;
  state.part = asked.get("part") || held.start.part;
  const view = asked.get("view") || "mean";
  state.view = ["rollout", "strongest"].includes(view) ? view : "mean";
  state.layer = Number(asked.get("layer")) || 0;
  state.head = Number(asked.get("head")) || 0;
  state.special = asked.get("special") === "1";
  state.tokens = asked.get("tokens") === "1";
  state.word = asked.get("word");
  state.nth = Number(asked.get("nth")) || 1;
}

function begin() {
  fromAddress();
  refresh();
  state.pinned = state.word ? placeOf(state.word, state.nth || 1) : firstChoice();
  drawAll();
}

element("controls").addEventListener("change", (event) => {
  const { id, value, checked } = event.target;
  if (id === "part") show({ part: levels[Number(value)].kind, layer: 0, head: 0 });
  else if (id === "view") show({ view: value });
  else if (id === "special" || id === "tokens") show({ [id]: checked });
  else show({ [id]: Number(value) });
});
element("controls").addEventListener("submit", (event) => event.preventDefault());
element("sentence").addEventListener("mouseleave", () => choose(state.pinned, false));
element("lines").addEventListener("mouseleave", () => choose(state.pinned, false));
addEventListener("hashchange", begin);
addEventListener("resize", () => {
  drawLines();
  drawQuery();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
begin();
