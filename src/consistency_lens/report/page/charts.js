"use strict";
// Charts by Observable Plot, drawn anew where their place changes its width. Colours are the style sheet's variables.

const ROW = 27;  // pixels of a row in a dot plot
const LOWEST = -1;  // of a share of variance: what lies below is named at the edge
const LINES = ["var(--line-0)", "var(--line-1)", "var(--line-2)", "var(--line-3)"];

// A figure with a caption, whose chart fills its width.
function chart(label, draw, legend = []) {
  const place = make("div", {className: "chart"});
  const caption = make("figcaption", {}, label, ...legend.map(legendEntry));
  let drawn = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.round(entry.contentRect.width);
    if (width < 40 || width === drawn) return;
    drawn = width;
    const plot = draw(width);
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", label);
    place.replaceChildren(plot);
  }).observe(place);
  return make("figure", {}, caption, place);
}

function legendEntry(label, index) {
  const swatch = make("span", {className: "swatch"});
  swatch.style.background = LINES[index % LINES.length];
  return make("span", {className: "legend"}, swatch, label);
}

// Values with their intervals, one row each: {label, value, low, high, strong}.
function dotPlot(label, rows, {axis, decimals = 2, domain, zero = false}) {
  return chart(label, width => {
    const values = rows.flatMap(row => [row.value, row.low, row.high]).filter(Number.isFinite);
    const [low, high] = domain ?? [Math.min(...values), Math.max(...values)];
    const pad = domain ? 0 : 0.06 * (high - low) || 0.5;
    const inside = rows.filter(row => row.value >= low), outside = rows.filter(row => row.value < low);
    const stroke = row => row.strong ? "var(--accent)" : "var(--faint)";
    const isBold = row => Boolean(row.strong) && !rows.every(of => of.strong);  // among others
    return Plot.plot({
      width, height: rows.length * ROW + 56, marginLeft: Math.min(190, 0.42 * width), marginRight: 52, marginTop: 8, marginBottom: 42,
      style: {fontSize: "13px"},
      x: {domain: [zero ? Math.min(0, low) : low - pad, high + pad], label: axis, labelAnchor: "center", labelArrow: "none", grid: true, nice: !domain, ticks: Math.max(3, Math.round(width / 110))},
      y: {domain: rows.map(row => row.label), label: null, tickSize: 0},
      marks: [
        ...(zero ? [Plot.ruleX([0], {stroke: "var(--faint)"})] : []),
        Plot.ruleY(inside.filter(row => Number.isFinite(row.low)), {y: "label", x1: "low", x2: "high", stroke, strokeWidth: 2}),
        Plot.tickX(inside.filter(row => Number.isFinite(row.low)).flatMap(row => [{...row, end: row.low}, {...row, end: row.high}]), {x: "end", y: "label", stroke, strokeWidth: 2, insetTop: 7, insetBottom: 7}),
        Plot.dot(inside, {x: "value", y: "label", fill: stroke, r: row => row.strong ? 5 : 4, title: row => `${row.label}: ${number(row.value, decimals)}`}),
        ...[true, false].map(strong => Plot.text(inside.filter(row => isBold(row) === strong), {x: row => Number.isFinite(row.high) ? Math.max(row.high, row.value) : row.value, y: "label", text: row => number(row.value, decimals), dx: 10, textAnchor: "start", fontWeight: strong ? "bold" : "normal"})),
        Plot.text(outside, {x: low, y: "label", text: row => `◂ ${number(row.value, decimals)}`, textAnchor: "start", dx: 4}),
      ],
    });
  });
}

// What reconstructions are worth: the lens first, then what it stands beside.
function comparisonPlot(label, compared) {
  const rows = compared.map((of, index) => ({
    label: of.label, value: of.fve, low: of.interval?.[0], high: of.interval?.[1], strong: index === 0,
  }));
  const lowest = Math.max(LOWEST, Math.min(0, ...rows.map(row => row.value)));
  const sorted = [...rows].sort((a, b) => b.value - a.value);
  return dotPlot(label, sorted, {axis: "FVE: 1 is perfect, 0 the mean activation", decimals: 3, domain: [lowest, Math.max(1, ...rows.map(row => row.value))], zero: true});
}

// Lines over steps or counts: {label, points: [[x, y], ...]}.
function linePlot(title, lines, {axis, stages = [], dots = false, scale = "linear", ticks, domain}) {
  const points = lines.flatMap((line, index) => line.points.map(([x, y]) => ({x, y, label: line.label, stroke: LINES[index % LINES.length]})));
  const last = Math.max(...points.map(point => point.x));
  return chart(title, width => Plot.plot({
    width, height: Math.min(260, 0.62 * width + 40), marginLeft: 50, marginBottom: 40, marginTop: 30,
    style: {fontSize: "12px"},
    x: {label: axis, labelAnchor: "center", labelArrow: "none", type: scale, base: scale === "log" ? 2 : undefined, ticks: ticks ?? Math.max(3, Math.round(width / 90)), tickFormat: ticks ? (value => `${value}`) : undefined},
    y: {label: null, grid: true, nice: true, domain},
    marks: [
      Plot.ruleX(stages.filter(stage => stage.start > 0), {x: "start", stroke: "var(--faint)", strokeDasharray: "3,3"}),
      Plot.text(stages, {x: stage => stage.start, frameAnchor: "top", text: "label", dy: -20, dx: 3, textAnchor: stage => stage.start > 0.7 * last ? "end" : "start", fill: "var(--faint)"}),
      Plot.line(points, {x: "x", y: "y", z: "label", stroke: "stroke", strokeWidth: 2}),
      ...(dots ? [Plot.dot(points, {x: "x", y: "y", fill: "stroke", r: 4})] : []),
      Plot.tip(points, Plot.pointer({x: "x", y: "y", title: point => `${point.label}\n${axis} ${point.x}: ${point.y.toPrecision(3)}`})),
    ],
  }), lines.length > 1 || lines[0].label !== title ? lines.map(line => line.label) : []);
}
