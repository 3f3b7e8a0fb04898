"use strict";
// Draws the curves of several runs from the JSON in #comparison: a legend that switches runs, a choice of the axis.
(() => {
  const { runs, axes, tables, charts } = JSON.parse(document.getElementById("comparison").textContent);
  const COLOURS = 6;
  const DASHES = [[], [8, 5], [2, 4]];
  const AXES = Object.keys(axes);
  const controls = document.querySelector(".controls");
  const hidden = new Set();
  let axis = 0;

  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = digits => value => value.toLocaleString("en", { maximumFractionDigits: digits });
  const compact = value => value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 2 });

  function swatch(run) {
    const line = document.createElement("i");
    line.className = `swatch run-${run % COLOURS} dash-${Math.floor(run / COLOURS) % 3}`;
    return line;
  }

  // Labels of the horizontal axis; seconds become minutes and hours where they are many.
  function ticks(plot, values) {
    if (AXES[axis] !== "seconds") return values.map(value => (Number.isInteger(value) ? compact(value) : ""));
    const most = plot.scales.x.max;
    const [unit, name] = most > 10800 ? [3600, "h"] : most > 600 ? [60, "min"] : [1, "s"];
    return values.map(value => `${number(2)(value / unit)} ${name}`);
  }

  const place = value => (AXES[axis] === "seconds" ? `${number(1)(value)} s` : `${AXES[axis] === "step" ? "step " : ""}${number(0)(value)}${AXES[axis] === "tokens" ? " tokens" : ""}`);

  // The last value at or before a place.
  function valueAt(values, index) {
    for (let i = index; i >= 0; i--) if (values[i] != null) return values[i];
    return null;
  }

  // One row of places for all runs, and a line (and what lies behind it) for each.
  function lines(chart) {
    const found = [];
    tables[chart.stage].forEach((table, run) => {
      const columns = table && table.columns[chart.key];
      if (!columns || !columns[0].length) return;
      if (chart.raw) found.push({ run, raw: true, x: columns[axis], y: columns[3] });
      found.push({ run, raw: false, x: columns[axis], y: columns[4] || columns[3] });
    });
    return found;
  }

  function draw(holder) {
    const chart = charts.find(one => one.name === holder.dataset.chart);
    const drawn = lines(chart).sort((a, b) => b.raw - a.raw); // what lies behind first
    const height = holder.parentElement.classList.contains("wide") ? 340 : 240;
    const grid = { stroke: colour("--line"), width: 1 };
    const look = { stroke: colour("--soft"), grid, ticks: grid, labelFont: "12px system-ui", font: "12px system-ui", labelSize: 22 };
    const series = drawn.map(({ run, raw, x }) => {
      const stroke = colour(`--run-${run % COLOURS}`);
      const few = x.length < 2 || (chart.points && x.length <= 60);
      return {
        stroke: raw ? `${stroke}55` : stroke,
        width: raw ? 1 : 2,
        dash: raw ? [] : DASHES[Math.floor(run / COLOURS) % 3],
        spanGaps: true,
        show: !hidden.has(run),
        points: { show: !raw && few, size: 6, fill: stroke },
      };
    });
    const box = document.createElement("div");
    const readout = document.createElement("div");
    readout.className = "readout";
    holder.replaceChildren(box, readout);
    const options = {
      width: holder.clientWidth,
      height,
      legend: { show: false },
      scales: {
        x: { time: false, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: chart.from_zero ? { range: (_, low, high) => [0, (high || 1) * 1.1] } : {},
      },
      axes: [
        { ...look, label: axes[AXES[axis]], size: 32, values: ticks },
        { ...look, size: 62, values: (_, values) => values.map(value => (value >= 10000 ? compact(value) : number(3)(value))) },
      ],
      series: [{}, ...series],
      cursor: { drag: { x: true, y: false }, points: { size: 7 }, sync: { key: chart.stage } },
      hooks: {
        setCursor: [plot => tell(plot, chart, drawn, readout)],
        setSeries: [plot => tell(plot, chart, drawn, readout)],
        draw: [plot => { if (chart.key === "loss") mark(plot, chart); }],
      },
    };
    const joined = uPlot.join(drawn.map(({ x, y }) => [x, y]));
    const plot = new uPlot(options, joined, box);
    plot.drawn = drawn;
    tell(plot, chart, drawn, readout);
    return plot;
  }

  // What each run has at the cursor, or at its end.
  function tell(plot, chart, drawn, readout) {
    const end = plot.data[0].length - 1;
    const index = plot.cursor.idx ?? end;
    const said = [];
    if (plot.cursor.idx != null) said.push(Object.assign(document.createElement("span"), { textContent: place(plot.data[0][index]) }));
    drawn.forEach(({ run, raw }, at) => {
      if (raw || hidden.has(run)) return;
      const value = valueAt(plot.data[at + 1], index);
      const item = document.createElement("span");
      const figure = Object.assign(document.createElement("b"), { textContent: value == null ? "none yet" : number(chart.digits)(value) });
      item.append(swatch(run), `${runs[run]} `, figure);
      said.push(item);
    });
    readout.replaceChildren(...said);
  }

  // Spikes and skipped steps: buttons on the curve, so that a pointer and the keyboard both find their text.
  function mark(plot, chart) {
    plot.over.querySelectorAll(".mark").forEach(old => old.remove());
    tables[chart.stage].forEach((table, run) => {
      if (!table || hidden.has(run)) return;
      for (const one of table.marks) {
        const x = plot.valToPos(one.at[axis], "x");
        const y = plot.valToPos(one.y, "y");
        if (x < 0 || x > plot.over.clientWidth || y < 0 || y > plot.over.clientHeight) continue;
        const button = document.createElement("button");
        button.type = "button";
        button.className = `mark run-${run % COLOURS} ${x > plot.over.clientWidth / 2 ? "left" : ""} ${y < 90 ? "below" : ""}`;
        button.style.left = `${x}px`;
        button.style.top = `${y}px`;
        button.append(one.kind === "spike" ? "▲" : "✕", Object.assign(document.createElement("span"), { textContent: one.text }));
        button.setAttribute("aria-label", one.text);
        plot.over.append(button);
      }
    });
  }

  const holders = [...document.querySelectorAll("[data-chart]")];
  let plots = new Map();
  const drawAll = () => {
    plots.forEach(plot => plot.destroy());
    plots = new Map(holders.map(holder => [holder, draw(holder)]));
  };

  // The keyboard's part of what the pointer can do.
  function press(event) {
    const plot = plots.get(event.currentTarget);
    if (event.target !== event.currentTarget || event.ctrlKey || event.metaKey || event.altKey) return;
    const [x, { min, max }] = [plot.data[0], plot.scales.x];
    const [first, last] = [x.findIndex(value => value >= min), x.findLastIndex(value => value <= max)];
    const stride = Math.max(1, Math.round((last - first) / 100));
    const at = plot.cursor.idx ?? last;
    const zoom = factor => {
      const middle = x[at], half = ((max - min) * factor) / 2;
      plot.setScale("x", { min: Math.max(x[0], middle - half), max: Math.min(x[x.length - 1], middle + half) });
    };
    const keys = {
      ArrowLeft: () => go(at - stride), ArrowRight: () => go(at + stride), Home: () => go(first), End: () => go(last),
      "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), 0: () => plot.setScale("x", { min: x[0], max: x[x.length - 1] }),
    };
    const go = index => {
      const left = plot.valToPos(x[Math.min(Math.max(index, first), last)], "x");
      plot.setCursor({ left, top: plot.over.clientHeight / 2 });
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }
  holders.forEach(holder => holder.addEventListener("keydown", press));

  // The legend: a switch a run; pointing at one, or tabbing to it, lets the others fade.
  function emphasise(run) {
    plots.forEach(plot => {
      plot.drawn.forEach((one, at) => { plot.series[at + 1].alpha = run == null || one.run === run ? 1 : 0.15; });
      plot.redraw();
    });
  }
  controls.querySelectorAll("[data-run]").forEach(label => {
    const run = Number(label.dataset.run);
    const box = label.querySelector("input");
    box.checked = true;
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(run);
      else hidden.add(run);
      plots.forEach(plot => plot.drawn.forEach((one, at) => {
        if (one.run === run) plot.setSeries(at + 1, { show: box.checked });
      }));
      emphasise(box.checked ? run : null);
    });
    label.addEventListener("mouseenter", () => { if (!hidden.has(run)) emphasise(run); });
    label.addEventListener("mouseleave", () => emphasise(null));
    box.addEventListener("focus", () => { if (!hidden.has(run) && box.matches(":focus-visible")) emphasise(run); });
    box.addEventListener("blur", () => emphasise(null));
  });
  controls.querySelectorAll("[name=axis]").forEach(choice => {
    choice.checked = choice.value === AXES[0];
    choice.addEventListener("change", () => { axis = AXES.indexOf(choice.value); drawAll(); });
  });

  controls.hidden = false;
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", drawAll);
  const watch = new ResizeObserver(entries => {
    for (const { target } of entries) {
      const plot = plots.get(target);
      const width = target.clientWidth;
      if (plot && width && plot.width !== width) plot.setSize({ width, height: plot.height });
    }
  });
  holders.forEach(holder => watch.observe(holder));
})();
