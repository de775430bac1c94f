// Small helpers for charts: elements, scales, axes, one tooltip. Text enters the page by textContent only.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** An SVG element; children are elements or strings. */
function svg(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** An HTML element; children are elements or strings. */
function html(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** A linear map from [from0, from1] to [to0, to1]. */
function linear(from0, from1, to0, to1) {
  const factor = from1 === from0 ? 0 : (to1 - to0) / (from1 - from0);
  return (x) => to0 + (x - from0) * factor;
}

/** About `count` round numbers inside [lo, hi]: steps of 1, 2 or 5 times a power of ten. */
function ticks(lo, hi, count) {
  if (!(hi > lo)) return [lo];
  const rough = (hi - lo) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const result = [];
  for (let place = Math.ceil(lo / step - 1e-9); place * step <= hi + step * 1e-9; place += 1) {
    result.push(Number((place * step).toPrecision(12)));
  }
  return result;
}

/** A number in at most four significant digits: 12,300 1.25 0.0031 4e-5. */
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value < 0) return `−${short(-value)}`;
  const size = value;
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return Number(value.toPrecision(size >= 1000 ? 7 : 4)).toLocaleString("en", { maximumFractionDigits: 6 });
}

function percent(value) {
  return `${short(100 * value)}\u00a0%`;
}

const FORMATS = { number: short, share: percent };

const printed = [];

/** Redraw `draw(width)` whenever the host's width changes, and at `paper` pixels to print. Returns the redraw function. */
function responsive(host, draw, paper = 680) {
  let width = 0;
  const redraw = () => {
    if (width > 0) draw(width);
  };
  // Printing does not wait for observers, and what was folded until now has no width.
  printed.push({ before: () => draw(paper), after: redraw });
  new ResizeObserver((entries) => {
    const now = Math.round(entries[0].contentRect.width);
    if (now === width || now === 0) return;
    width = now;
    redraw();
  }).observe(host);
  return redraw;
}

/** A drawing of width x height user units = pixels, which still scales when printed. */
function canvas(width, height, label) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
}

function text(x, y, content, attributes) {
  return svg("text", { x, y, ...attributes }, content);
}

/** Horizontal rules with their numbers at the left. */
function verticalAxis(values, y, left, right, format) {
  return values.flatMap((value) => [
    svg("line", { class: "rule", x1: left, x2: right, y1: y(value), y2: y(value) }),
    text(left - 6, y(value) + 4, format(value), { "text-anchor": "end" }),
  ]);
}

/** The line at the bottom with its numbers and a name at the right end. */
function horizontalAxis(values, x, left, right, bottom, name, format) {
  const room = name ? right - 7 * name.length - 6 : right;
  return [
    svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    ...values
      .filter((value) => x(value) + 3.5 * format(value).length <= room)
      .map((value) => text(x(value), bottom + 17, format(value), { "text-anchor": "middle" })),
    name ? text(right, bottom + 17, name, { "text-anchor": "end" }) : null,
  ].filter((element) => element !== null);
}

const tip = {
  element: document.getElementById("tip"),
  /** Show lines of text (the first one strong) near a point of the page. */
  show(lines, pageX, pageY) {
    this.element.replaceChildren(html("strong", {}, lines[0]), ...lines.slice(1).map((line) => html("div", {}, line)));
    this.element.hidden = false;
    const width = this.element.offsetWidth;
    const room = document.documentElement.clientWidth - width - 8;
    this.element.style.left = `${Math.max(8, Math.min(pageX + 14, room))}px`;
    this.element.style.top = `${pageY - this.element.offsetHeight - 12 > window.scrollY ? pageY - this.element.offsetHeight - 12 : pageY + 18}px`;
  },
  hide() {
    this.element.hidden = true;
  },
};

/**
 * Let a reader step through the places of a chart, by pointer or with the arrow keys.
 * places: [{x, y, lines}] in user units, x ascending; select(place or null) draws the cursor.
 */
function explorable(drawing, places, select) {
  if (places.length === 0) return;
  let current = -1;
  const scale = () => drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width;
  const go = (index) => {
    current = Math.max(0, Math.min(places.length - 1, index));
    const place = places[current];
    const box = drawing.getBoundingClientRect();
    select(place);
    tip.show(place.lines, box.left + window.scrollX + place.x * scale(), box.top + window.scrollY + place.y * scale());
  };
  const leave = () => {
    current = -1;
    select(null);
    tip.hide();
  };
  drawing.setAttribute("tabindex", "0");
  drawing.addEventListener("pointermove", (event) => {
    const x = (event.clientX - drawing.getBoundingClientRect().left) / scale();
    let nearest = 0;
    places.forEach((place, index) => {
      if (Math.abs(place.x - x) < Math.abs(places[nearest].x - x)) nearest = index;
    });
    go(nearest);
  });
  drawing.addEventListener("pointerleave", leave);
  drawing.addEventListener("blur", leave);
  drawing.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10 };
    if (event.key === "Escape") leave();
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(places.length - 1);
    else if (steps[event.key]) go(current < 0 ? 0 : current + steps[event.key]);
    else return;
    event.preventDefault();
  });
}

/** A vertical line that follows the selected place. */
function cursor(drawing, top, bottom) {
  const line = svg("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
  drawing.append(line);
  return (place) => {
    line.setAttribute("visibility", place ? "visible" : "hidden");
    if (place) {
      line.setAttribute("x1", place.x);
      line.setAttribute("x2", place.x);
    }
  };
}

/** The least and greatest of many numbers (Math.min(...) runs out of stack). */
function extent(values) {
  let lo = Infinity;
  let hi = -Infinity;
  for (const value of values) {
    if (value < lo) lo = value;
    if (value > hi) hi = value;
  }
  return [lo, hi];
}
