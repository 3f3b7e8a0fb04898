"use strict";
// Draws every figure that has data-chart from the JSON in #chart-data, again when the colours change.
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const holders = [...document.querySelectorAll("[data-chart]")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = digits => value => value.toLocaleString("en", { maximumFractionDigits: digits });
  const height = 260;

  // The last value at or before a place, so that the legend always has something to say.
  function valueAt(values, place) {
    for (let i = place ?? values.length - 1; i >= 0; i--) if (values[i] != null) return values[i];
    return null;
  }

  function draw(holder) {
    const chart = charts[holder.dataset.chart];
    const single = chart.x.length === 1;
    const grid = { stroke: colour("--line"), width: 1 };
    const axis = { stroke: colour("--soft"), grid, ticks: grid, labelFont: "12px system-ui", font: "12px system-ui", labelSize: 22 };
    const looks = {
      faint: { stroke: colour("--chart-raw"), width: 1, points: { show: single } },
      line: { stroke: colour("--chart-line"), width: 2, points: { show: single, size: 8 } },
      points: {
        stroke: colour("--chart-mark"), width: 1, dash: [4, 3],
        points: { show: true, size: 8, width: 2, stroke: colour("--chart-mark"), fill: colour("--paper") },
      },
    };
    const options = {
      width: holder.clientWidth,
      height,
      scales: {
        x: { time: false, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: chart.from_zero ? { range: (_, low, high) => [0, (high || 1) * 1.1] } : {},
      },
      axes: [
        { ...axis, label: chart.x_label, size: 32, values: (_, ticks) => ticks.map(t => (Number.isInteger(t) ? number(0)(t) : "")) },
        { ...axis, label: chart.y_label, size: 58, values: (_, ticks) => ticks.map(number(3)) },
      ],
      series: [
        { label: chart.x_label, value: (u, v, s, i) => number(0)(valueAt(chart.x, i)) },
        ...chart.series.map(one => ({
          label: one.label,
          spanGaps: true,
          ...looks[one.look],
          value: (u, v, s, i) => {
            const found = valueAt(one.values, i);
            return found == null ? "none yet" : number(chart.digits)(found);
          },
        })),
      ],
      cursor: { drag: { x: true, y: false }, points: { size: 7 } },
      hooks: {
        setCursor: [u => { if (u.cursor.idx == null) u.setLegend({ idx: chart.x.length - 1 }); }],
      },
    };
    holder.replaceChildren();
    const plot = new uPlot(options, [chart.x, ...chart.series.map(one => one.values)], holder);
    plot.setLegend({ idx: chart.x.length - 1 });
    return plot;
  }

  let plots = new Map();
  const drawAll = () => {
    plots.forEach(plot => plot.destroy());
    plots = new Map(holders.map(holder => [holder, draw(holder)]));
  };
  drawAll();
  dark.addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", drawAll);
  const watch = new ResizeObserver(entries => {
    for (const { target } of entries) {
      const plot = plots.get(target);
      const width = target.clientWidth;
      if (plot && width && plot.width !== width) plot.setSize({ width, height });
    }
  });
  holders.forEach(holder => watch.observe(holder));
})();
