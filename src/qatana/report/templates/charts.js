// The charts. Each takes its host element, its data and a width, and replaces what the host shows.

const DASHES = ["", "", "7 3", "2 3", "9 3 2 3", "12 4"];

/** Dots of PTQ and QAT against the line of float, one row per variant. */
function drawResults(host, results, width) {
  const left = Math.min(110, 24 + 8 * Math.max(...results.rows.map((row) => row.name.length)));
  const [top, step] = [26, 42];
  const height = top + results.rows.length * step + 26;
  const stages = ["float", "ptq", "qat"];
  const [lo, hi] = extent(results.rows.flatMap((row) => stages.map((stage) => row[stage])).filter((v) => v !== null));
  const pad = (hi - lo || 1) * 0.04;
  const right = width - 104;
  const x = linear(lo - pad, hi + pad, left + 46, right);
  const base = height - 24;
  const drawing = canvas(width, height, resultsLabel(results));
  drawing.append(...horizontalAxis(ticks(lo, hi, width / 110), x, left, right + 12, base, "", short), text(width, base + 17, results.unit, { "text-anchor": "end" }));
  const float = results.rows[0].float;
  drawing.append(
    svg("line", { class: "c-float stroke", x1: x(float), x2: x(float), y1: top - 8, y2: base }),
    text(x(float), top - 13, `float ${float.toFixed(2)}`, { "text-anchor": "middle", class: "strong" }),
  );
  results.rows.forEach((row, index) => drawing.append(...resultRow(row, top + (index + 0.5) * step, x, width)));
  host.replaceChildren(drawing);
}

/** PTQ is named beside its dot; what ships stands at the right with its distance to float. */
function resultRow(row, y, x, width) {
  const beside = row.ptq !== null && row.ptq > (row.qat ?? row.float) ? { dx: 11, anchor: "start" } : { dx: -11, anchor: "end" };
  const final = row.qat ?? row.ptq;
  const parts = [text(0, y + 5, row.name, { class: "strong" })];
  if (row.qat !== null) parts.push(svg("line", { class: "dots", x1: x(row.qat), x2: x(row.float), y1: y, y2: y }));
  if (row.qat !== null && row.ptq !== null) {
    parts.push(svg("line", { class: "c-qat stroke", x1: x(row.ptq), x2: x(row.qat), y1: y, y2: y }));
  }
  if (row.ptq !== null) {
    parts.push(text(x(row.ptq) + beside.dx, y + 4, row.ptq.toFixed(2), { "text-anchor": beside.anchor, class: "halo" }), svg("circle", { class: "c-ptq open", cx: x(row.ptq), cy: y, r: 6 }));
  }
  if (row.qat !== null) {
    parts.push(svg("circle", { class: "c-qat fill", cx: x(row.qat), cy: y, r: 7 }));
  }
  const change = final - row.float;
  parts.push(
    text(width - 50, y + 5, final.toFixed(2), { "text-anchor": "end", class: "strong" }),
    text(width, y + 5, `${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(2)}`, { "text-anchor": "end" }),
  );
  return parts;
}

function resultsLabel(results) {
  const one = (row) => `${row.name}: float ${short(row.float)}, PTQ ${short(row.ptq)}, QAT ${short(row.qat)}`;
  return `${results.metric}. ${results.rows.map(one).join("; ")}`;
}

/** Exponential moving average over about a thirtieth of the points. */
function smooth(values) {
  const weight = 2 / (1 + Math.max(1, values.length / 30));
  let average = values[0];
  return values.map((value) => (average += weight * (value - average)));
}

function path(xs, ys, x, y) {
  return xs.map((step, index) => `${index ? "L" : "M"}${x(step).toFixed(1)} ${y(ys[index]).toFixed(1)}`).join("");
}

function runClass(run) {
  return `run${run.color} stroke`;
}

/** One quantity over the training steps, one line per run that is not hidden. */
function drawPanel(host, panel, runs, hidden, width) {
  const lines = panel.lines.filter((line) => !hidden.has(line.run));
  if (lines.length === 0) {
    host.replaceChildren(html("p", { class: "empty" }, "No run shown."));
    return;
  }
  const [left, right, top, height] = [52, width - 8, 10, 190];
  const base = height - 26;
  const format = FORMATS[panel.unit];
  const [first, last] = extent(lines.flatMap((line) => line.x));
  let [lo, hi] = extent(lines.flatMap((line) => line.y));
  if (lo > 0 && lo < 0.4 * hi) lo = 0;
  if (lo === hi) [lo, hi] = [lo - Math.abs(lo || 1) / 10, hi + Math.abs(hi || 1) / 10];
  const x = linear(first, last, left, right);
  const y = linear(lo, hi + (hi - lo) * 0.04, base, top);
  const names = lines.map((line) => runs[line.run].name).join(", ");
  const drawing = canvas(width, height, `${panel.title} from step ${first} to ${last}: ${names}`);
  drawing.append(
    ...verticalAxis(ticks(lo, hi, 5), y, left, right, format),
    ...horizontalAxis(ticks(first, last, width / 80), x, left, right, base, "step", short),
    ...marks(lines, runs, x, top, base),
    ...lines.flatMap((line) => panelLine(panel, line, runs[line.run], x, y)),
    ...lines.filter((line) => line.broken !== null).flatMap((line, place) => brokenLine(line, runs[line.run], x, top, base, place)),
  );
  host.replaceChildren(drawing);
  explorable(drawing, panelPlaces(lines, runs, x, y, format), cursor(drawing, top, base));
}

function marks(lines, runs, x, top, base) {
  const seen = new Map();
  for (const line of lines) for (const mark of runs[line.run].marks) seen.set(`${mark.step} ${mark.text}`, mark);
  return [...seen.values()].map((mark) =>
    svg("line", { class: "mark", x1: x(mark.step), x2: x(mark.step), y1: top, y2: base }, svg("title", {}, mark.text)),
  );
}

/** Where a run stopped giving numbers: said aloud, as a line that merely ends looks like a finished run. */
function brokenLine(line, run, x, top, base, place) {
  const at = Math.max(x(line.x[0]), Math.min(x(line.broken), x(line.x.at(-1)) + 4));
  return [
    svg("line", { class: `run${run.color} broken`, x1: at, x2: at, y1: top, y2: base }),
    text(at + 6, top + 12 + 15 * place, `${run.name}: not a number from step ${short(line.broken)}`, { class: "strong halo" }),
  ];
}

function panelLine(panel, line, run, x, y) {
  const dash = { "stroke-dasharray": DASHES[run.color] || null };
  const parts = [];
  if (panel.key === "loss" && line.y.length > 60) {
    parts.push(svg("path", { class: `${runClass(run)} faint`, d: path(line.x, line.y, x, y) }));
    parts.push(svg("path", { class: runClass(run), d: path(line.x, smooth(line.y), x, y), ...dash }));
  } else {
    parts.push(svg("path", { class: runClass(run), d: path(line.x, line.y, x, y), ...dash }));
    if (line.x.length <= 30) {
      line.x.forEach((step, index) => parts.push(svg("circle", { class: `run${run.color} fill`, cx: x(step), cy: y(line.y[index]), r: 3.5 })));
    }
  }
  return parts;
}

/** One place per step of any line, with the latest value of each run. */
function panelPlaces(lines, runs, x, y, format) {
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const at = lines.map(() => 0);
  return steps.map((step) => {
    const values = lines.map((line, place) => {
      while (at[place] + 1 < line.x.length && line.x[at[place] + 1] <= step) at[place] += 1;
      return step >= line.x[0] ? line.y[at[place]] : null;
    });
    const known = values.filter((value) => value !== null);
    return {
      x: x(step),
      y: Math.min(...known.map(y)),
      lines: [
        `step ${short(step)}`,
        ...lines.map((line, place) => `${runs[line.run].name}: ${format(values[place])}`).filter((_, place) => values[place] !== null),
      ],
    };
  });
}

/** SQNR of each visible row of the table, in the model's order; returns the worst rows, worst first. */
function drawLayers(host, rows, width) {
  if (rows.length === 0) {
    host.replaceChildren(html("p", { class: "empty" }, "No layer matches."));
    return [];
  }
  const [left, right, top, height] = [34, width - 8, 22, 260];
  const base = height - 24;
  const known = rows.flatMap((row) => [row.ptq, row.qat]).filter(Number.isFinite);
  const [least, most] = known.length ? extent(known) : [0, 1];
  const [lo, hi] = [Math.min(0, least), most * 1.05];
  // An exact tensor has no error: it sits on the upper edge.
  const y = (value) => linear(lo, hi, base, top)(Math.min(value, hi));
  const x = linear(-0.5, rows.length - 0.5, left, right);
  const drawing = canvas(width, height, `SQNR in dB of ${rows.length} tensors, from ${short(least)} to ${short(most)}; the table below has every number`);
  drawing.append(...verticalAxis(ticks(lo, hi, 5), y, left, right, short), text(0, 10, "dB"));
  drawing.append(...horizontalAxis([], x, left, right, base, "", short), text(left, base + 17, "first layer"), text(right, base + 17, "last layer", { "text-anchor": "end" }));
  const radius = Math.max(2.2, Math.min(5, (right - left) / rows.length / 2.6));
  rows.forEach((row, index) => drawing.append(...layerDots(row, x(index), y, radius)));
  const worst = worstRows(rows);
  worst.forEach((row, rank) => {
    const cx = x(rows.indexOf(row));
    const below = y(Math.min(...finalAndFirst(row))) + 15;
    const cy = below + 8 < base ? below : y(Math.max(...finalAndFirst(row))) - 15;
    drawing.append(svg("circle", { class: "badge", cx, cy, r: 8 }), text(cx, cy + 4, String(rank + 1), { class: "badge-text" }));
  });
  host.replaceChildren(drawing);
  explorable(drawing, rows.map((row, index) => layerPlace(row, x(index), y)), cursor(drawing, top, base));
  return worst;
}

function finalAndFirst(row) {
  return [row.ptq, row.qat].filter((value) => !Number.isNaN(value));
}

/** What ships: after QAT where it was trained, else after PTQ. */
function shipped(row) {
  return Number.isNaN(row.qat) ? row.ptq : row.qat;
}

function worstRows(rows) {
  const count = rows.length < 10 ? 1 : 5;
  return rows.filter((row) => Number.isFinite(shipped(row))).sort((a, b) => shipped(a) - shipped(b)).slice(0, count);
}

function layerDots(row, x, y, r) {
  const dot = (value, name) =>
    row.role === "weight"
      ? svg("circle", { class: name, cx: x, cy: y(value), r })
      : svg("rect", { class: name, x: x - r, y: y(value) - r, width: 2 * r, height: 2 * r });
  const parts = [];
  if (!Number.isNaN(row.ptq) && !Number.isNaN(row.qat)) {
    parts.push(svg("line", { class: "c-qat stroke", x1: x, x2: x, y1: y(row.ptq), y2: y(row.qat) }));
  }
  if (!Number.isNaN(row.ptq)) parts.push(dot(row.ptq, "c-ptq open"));
  if (!Number.isNaN(row.qat)) parts.push(dot(row.qat, "c-qat fill"));
  return parts;
}

function decibel(value) {
  return value === Infinity ? "exact" : `${value.toFixed(1)} dB`;
}

function layerPlace(row, x, y) {
  const lines = [row.name, `${row.role}`];
  if (!Number.isNaN(row.ptq)) lines.push(`PTQ ${decibel(row.ptq)}`);
  if (!Number.isNaN(row.qat)) lines.push(`QAT ${decibel(row.qat)}`);
  const known = finalAndFirst(row);
  return { x, y: known.length ? Math.min(...known.map(y)) : 40, lines };
}

function edgesOf(stage) {
  if (Array.isArray(stage.edges)) return stage.edges;
  const count = stage.counts.length;
  const width = (stage.edges.hi - stage.edges.lo) / count;
  return Array.from({ length: count + 1 }, (_, place) => stage.edges.lo + place * width);
}

const STAGES = { float: "Float", ptq: "PTQ: before training", qat: "QAT: after training" };

/** One panel per stage over a common axis: the values as a filled outline, the codes as thin lines. */
function drawHistogram(host, entry, logarithmic, width) {
  const stages = entry.stages.map((stage) => ({ ...stage, edges: edgesOf(stage) }));
  const [lo, hi] = extent(stages.flatMap((stage) => [stage.edges[0], stage.edges.at(-1)]));
  const shape = stages.find((stage) => stage.stage === "float");
  const bounds = { left: 46, right: width - 10, lo, hi };
  const panels = stages.map((stage) => histogramPanel(stage, shape === stage ? null : shape, bounds, logarithmic, width, entry));
  host.replaceChildren(...panels);
}

/** Height of every bin as a share of the densest, so that stages with other bins compare. */
function heights(stage, logarithmic) {
  const total = stage.counts.reduce((sum, count) => sum + count, 0) || 1;
  const shares = stage.counts.map((count) => count / total);
  const most = Math.max(...shares) || 1;
  if (!logarithmic) return { tops: shares.map((share) => share / most), most, least: 0 };
  const least = 0.5 / total;
  const log = (share) => (share > least ? Math.log(share / least) / Math.log(most / least) : 0);
  return { tops: shares.map(log), most, least };
}

function outline(stage, tops, x, y, close) {
  let d = close ? `M${x(stage.edges[0]).toFixed(1)} ${y(0)}` : "";
  tops.forEach((top, place) => {
    const height = y(top).toFixed(1);
    d += `${d ? "L" : "M"}${x(stage.edges[place]).toFixed(1)} ${height}L${x(stage.edges[place + 1]).toFixed(1)} ${height}`;
  });
  return close ? `${d}L${x(stage.edges.at(-1)).toFixed(1)} ${y(0)}Z` : d;
}

function histogramPanel(stage, shape, bounds, logarithmic, width, entry) {
  const [top, height] = [stage.grid ? 48 : 34, stage.grid ? 172 : 158];
  const base = height - 24;
  const x = linear(bounds.lo, bounds.hi, bounds.left, bounds.right);
  const y = linear(0, 1, base, top);
  const { tops, most } = heights(stage, logarithmic);
  const total = stage.counts.reduce((sum, count) => sum + count, 0);
  const drawing = canvas(width, height, `${STAGES[stage.stage]}: ${total} values of ${entry.layer} between ${short(stage.edges[0])} and ${short(stage.edges.at(-1))}`);
  drawing.setAttribute("data-stage", stage.stage);
  drawing.append(
    ...clipped(stage.grid, x, bounds, top, base),
    svg("path", { class: `c-${stage.stage} area`, d: outline(stage, tops, x, y, true) }),
    ...gridLines(stage.grid, x, bounds, top, base),
    shape ? svg("path", { class: "shape", d: outline(shape, heights(shape, logarithmic).tops, x, y, false) }) : "",
    ...horizontalAxis(ticks(bounds.lo, bounds.hi, width / 90), x, bounds.left, bounds.right, base, "", short),
    text(bounds.left, 12, STAGES[stage.stage], { class: "strong" }),
    text(bounds.left, 28, stage.grid ? gridLabel(stage.grid) : `${short(total)} values`),
    text(bounds.left - 6, top + 8, percent(Number(most.toPrecision(2))), { "text-anchor": "end" }),
    text(bounds.left - 6, base, "0", { "text-anchor": "end" }),
  );
  explorable(drawing, stage.counts.map((count, place) => binPlace(stage, place, count, total, x, y(tops[place]))), cursor(drawing, top, base));
  return drawing;
}

function gridLabel(grid) {
  return `scale ${short(grid.scale)}, codes ${short(grid.lo)} to ${short(grid.hi)}${grid.zero ? `, zero point ${grid.zero}` : ""}`;
}

function gridValue(grid, code) {
  return (code - grid.zero) * grid.scale;
}

/** Tint what lies outside the grid, half a step beyond its last codes. */
function clipped(grid, x, bounds, top, base) {
  if (!grid) return [];
  const inside = (place) => Math.max(bounds.left, Math.min(bounds.right, place));
  const start = inside(x(gridValue(grid, grid.lo - 0.5)));
  const end = inside(x(gridValue(grid, grid.hi + 0.5)));
  return [[bounds.left, start], [end, bounds.right]]
    .filter(([from, to]) => to - from > 0.5)
    .map(([from, to]) => svg("rect", { class: "clip", x: from, y: top, width: to - from, height: base - top }));
}

/** Every code as a line where there is room, else every 2nd, 4th, ...; numbered where the lines stand wide. */
function gridLines(grid, x, bounds, top, base) {
  if (!grid) return [];
  const spacing = grid.scale * ((bounds.right - bounds.left) / (bounds.hi - bounds.lo));
  const step = 2 ** Math.max(0, Math.ceil(Math.log2(6 / spacing)));
  const wide = spacing >= 26;
  const parts = [];
  for (let code = Math.ceil(grid.lo / step) * step; code <= grid.hi; code += step) {
    const place = x(gridValue(grid, code));
    if (place < bounds.left || place > bounds.right) continue;
    parts.push(svg("line", { class: wide ? "gridline wide" : "gridline", x1: place, x2: place, y1: top, y2: base + 4 }));
    if (wide) parts.push(text(place, top - 4, short(code), { "text-anchor": "middle", class: "halo" }));
  }
  return parts;
}

function binPlace(stage, place, count, total, x, y) {
  const [from, to] = [stage.edges[place], stage.edges[place + 1]];
  const lines = [`${short(from)} to ${short(to)}`, `${short(count)} values, ${percent(count / (total || 1))}`];
  if (stage.grid) {
    const code = Math.round((from + to) / 2 / stage.grid.scale) + stage.grid.zero;
    lines.push(code < stage.grid.lo || code > stage.grid.hi ? "outside the grid: clipped" : `near code ${code}`);
  }
  return { x: x((from + to) / 2), y, lines };
}

/** Share of differing codes per tensor on a logarithmic axis; tensors without a difference sit on the base line. */
function drawRates(host, rows, width) {
  const [left, right, top, height] = [96, width - 8, 24, 180];
  const base = height - 24;
  const rates = rows.map((row) => (row.codes ? row.different / row.codes : 0));
  const positive = rates.filter((rate) => rate > 0);
  if (positive.length === 0) return;
  const [least, most] = extent(positive).map(Math.log10);
  const [lo, hi] = [Math.floor(least - 0.01), Math.ceil(most + 0.01)];
  const y = linear(lo, hi, base - 12, top);
  const x = linear(-0.5, rows.length - 0.5, left, right);
  const decades = Array.from({ length: hi - lo + 1 }, (_, place) => lo + place).filter((_, place, all) => place % Math.ceil(all.length / 5) === 0);
  const drawing = canvas(width, height, `Share of codes that differ, for ${rows.length} tensors in the order of the model; the table below has every number`);
  const word = (power) => (power >= -3 ? percent(10 ** power) : `${short(10 ** (power + 6))} per million`);
  drawing.append(...verticalAxis(decades, y, left, right, word), ...horizontalAxis([], x, left, right, base, "", short));
  drawing.append(text(left, base + 17, "first tensor"), text(right, base + 17, "last tensor", { "text-anchor": "end" }));
  const r = Math.max(1.6, Math.min(4, (right - left) / rows.length / 2.6));
  const first = rates.findIndex((rate) => rate > 0);
  drawing.append(svg("line", { class: "mark", x1: x(first), x2: x(first), y1: top - 6, y2: base }));
  const atEnd = x(first) > width / 2;
  drawing.append(text(x(first) + (atEnd ? -5 : 5), top - 8, `first difference: ${rows[first].operator || rows[first].name}`, { class: "strong", "text-anchor": atEnd ? "end" : "start" }));
  const height_ = (rate) => (rate > 0 ? y(Math.log10(rate)) : base);
  rates.forEach((rate, index) => {
    if (rate > 0) drawing.append(svg("line", { class: "c-ptq stroke", x1: x(index), x2: x(index), y1: base, y2: height_(rate) }));
    drawing.append(svg("circle", { class: rate > 0 ? "c-ptq fill" : "c-float fill", cx: x(index), cy: height_(rate), r }));
  });
  host.replaceChildren(drawing);
  const place = (row, index) => ({
    x: x(index),
    y: height_(rates[index]),
    lines: [row.name, row.operator, `${short(row.different)} of ${short(row.codes)} codes differ`].filter(Boolean),
  });
  explorable(drawing, rows.map(place), cursor(drawing, top, base));
}
