// What the page does: sorting, filters, drop-downs, runs on and off, printing.

const payload = JSON.parse(document.getElementById("payload").textContent);

// Tables -------------------------------------------------------------------------------------------------------------

function sortKey(row, column, kind) {
  const cell = row.cells[column];
  if (kind === "text") return cell.textContent.trim();
  return cell.dataset.v === "" || cell.dataset.v === undefined ? null : Number(cell.dataset.v);
}

/** Rows without a value stay last, whichever the direction. */
function compare(a, b, kind, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  return sign * (kind === "text" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
}

function sortTable(table, header, column) {
  const kind = header.querySelector("button").dataset.sort;
  const before = header.getAttribute("aria-sort");
  // Numbers: the first press shows the greatest first, as one looks for extremes.
  const direction = before === null ? (kind === "text" ? "ascending" : "descending") : before === "ascending" ? "descending" : "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction);
  const sign = direction === "ascending" ? 1 : -1;
  const keyed = [...table.tBodies[0].rows].map((row) => [sortKey(row, column, kind), row]);
  keyed.sort(([a], [b]) => compare(a, b, kind, sign));
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => sortTable(table, header, column));
  });
}

function applyFilters(table) {
  const fields = [...document.querySelectorAll(`[data-filter="${table.id}"]`)];
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const keep = fields.every((field) => {
      const wanted = field.value;
      if (field.dataset.field) return (wanted === "" && field.options[0].value === "") || row.dataset[field.dataset.field] === wanted;
      return row.textContent.toLowerCase().includes(wanted.trim().toLowerCase());
    });
    row.hidden = !keep;
    shown += keep ? 1 : 0;
  }
  const note = document.querySelector(`[data-shown="${table.id}"]`);
  if (note) note.textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
  table.dispatchEvent(new Event("filtered"));
}

function watchFilters(table) {
  for (const field of document.querySelectorAll(`[data-filter="${table.id}"]`)) {
    field.addEventListener(field.type === "search" ? "input" : "change", () => applyFilters(table));
  }
  applyFilters(table);
}

// Charts -------------------------------------------------------------------------------------------------------------

function setUpResults(host) {
  responsive(host, (width) => drawResults(host, payload.results, width));
}

/** Runs of float models are grey, the others take the colours in turn. */
function colorRuns(runs) {
  let next = 0;
  return runs.map((run) => ({ ...run, color: run.name.startsWith("float") ? 0 : 1 + (next++ % 5) }));
}

function setUpCurves(host) {
  const runs = colorRuns(payload.curves.runs);
  const hidden = new Set();
  const panels = payload.curves.panels.map((panel) => {
    const place = html("div", {});
    host.append(html("div", { class: "card" }, html("h3", {}, panel.title), place));
    return responsive(place, (width) => drawPanel(place, panel, runs, hidden, width), 330);
  });
  runs.forEach((run, index) => {
    const swatch = svg("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" });
    swatch.append(svg("line", { class: runClass(run), x1: 0, x2: 26, y1: 4, y2: 4, "stroke-dasharray": DASHES[run.color] || null }));
    const button = html("button", { type: "button", "aria-pressed": "true" }, swatch, run.name);
    button.addEventListener("click", () => {
      if (!hidden.delete(index)) hidden.add(index);
      button.setAttribute("aria-pressed", String(!hidden.has(index)));
      panels.forEach((redraw) => redraw());
    });
    document.getElementById("runs").append(button);
  });
}

function setUpLayers(host) {
  const table = document.getElementById(host.dataset.table);
  const read = (text) => (text === "" ? NaN : Number(text));
  // Kept from the start: sorting the table must not change the order along the model.
  const rows = [...table.tBodies[0].rows].map((row) => ({
    row, name: row.dataset.name, role: row.dataset.role, ptq: read(row.dataset.ptq), qat: read(row.dataset.qat),
  }));
  const redraw = responsive(host, (width) => {
    nameWorst(drawLayers(host, rows.filter((entry) => !entry.row.hidden), width));
  });
  table.addEventListener("filtered", redraw);
}

function nameWorst(worst) {
  const items = worst.map((row) =>
    html("li", {}, html("code", {}, row.name), ` ${row.role}: ${decibel(shipped(row))}${Number.isNaN(row.ptq) || Number.isNaN(row.qat) ? "" : ` (PTQ ${decibel(row.ptq)})`}`),
  );
  const host = document.getElementById("worst");
  host.replaceChildren(...(items.length ? [html("strong", {}, items.length > 1 ? "Lowest SQNR" : "Lowest"), html("ol", {}, ...items)] : []));
}

function setUpHistograms(select) {
  const entries = payload.histograms;
  const host = document.getElementById("chart-histogram");
  const log = document.getElementById("histogram-log");
  const variants = [...new Set(entries.map((entry) => entry.variant))];
  for (const variant of variants) {
    const options = entries.flatMap((entry, index) => (entry.variant === variant ? [html("option", { value: index }, `${entry.layer} (${entry.role})`)] : []));
    select.append(...(variants.length > 1 ? [html("optgroup", { label: variant || "all variants" }, ...options)] : options));
  }
  const redraw = responsive(host, (width) => drawHistogram(host, entries[Number(select.value)], log.checked, width));
  select.addEventListener("change", redraw);
  log.addEventListener("change", redraw);
  for (const button of document.querySelectorAll("[data-histogram]")) {
    button.addEventListener("click", () => {
      const row = button.closest("tr").dataset;
      select.value = String(entries.findIndex((entry) => entry.layer === row.name && entry.role === row.role && entry.variant === row.variant));
      redraw();
      document.getElementById("histograms").scrollIntoView();
      select.focus({ preventScroll: true });
    });
  }
}

function setUpRates(host) {
  const table = document.getElementById(host.dataset.rates);
  const rows = [...table.tBodies[0].rows].map((row) => ({
    name: row.dataset.name, operator: row.dataset.operator, codes: Number(row.dataset.codes), different: Number(row.dataset.different),
  }));
  responsive(host, (width) => drawRates(host, rows, width));
}

const SET_UP = {
  "chart-results": setUpResults,
  "chart-curves": setUpCurves,
  "chart-layers": setUpLayers,
  "histogram-layer": setUpHistograms,
};
for (const [id, setUp] of Object.entries(SET_UP)) {
  const host = document.getElementById(id);
  if (host) setUp(host);
}
document.querySelectorAll("[data-rates]").forEach(setUpRates);
["table-layers", "table-plan"].map((id) => document.getElementById(id)).filter(Boolean).forEach(watchFilters);

// A printed page can't be opened: everything folded is unfolded for it, and folded again after.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((element) => (element.open = true));
  printed.forEach((chart) => chart.before());
});
window.addEventListener("afterprint", () => {
  folded.forEach((element) => (element.open = false));
  printed.forEach((chart) => chart.after());
});
