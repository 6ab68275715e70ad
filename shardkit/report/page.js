"use strict";
// Everything told by a run goes in as text: nothing of it can become markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const MOST_TILES = 64, SIDE = 100;
// Told apart without red and green, too (Okabe and Ito); names stand beside them.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00",
  "#8b6cc4", "#a39a1f"];
// Of several processes ids are far apart; a device keeps its colour on every mesh.
const DEVICES = [...new Set((data.meshes || []).flatMap((mesh) => mesh.ids))].sort((a, b) => a - b);
const colourOf = (id) => COLOURS[DEVICES.indexOf(id) % COLOURS.length];

function make(tag, className, ...inner) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...inner.filter((x) => x !== null));
  return made;
}
function draw(tag, attributes, ...inner) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  made.append(...inner);
  return made;
}

// The newest entry of a sorted list that is not after a step; -1 if none is.
function newest(rows, step) {
  let low = 0, high = rows.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rows[middle][0] <= step) low = middle + 1; else high = middle;
  }
  return low - 1;
}

function watch(chart) {
  const plot = chart.querySelector("svg.plot"), cross = make("div", "cross"), tip = make("div", "tip");
  const curves = data.curves.filter((curve) => curve.chart === chart.id);
  const hide = () => { cross.hidden = tip.hidden = true; };
  hide();
  chart.append(cross, tip);
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect(), outer = chart.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const wanted = data.low + share * (data.high - data.low);
    // The nearest step of which there is a point, whichever curve has it.
    const steps = curves.flatMap(({ points }) => {
      const at = newest(points, wanted);
      return points.slice(Math.max(0, at), at + 2).map((row) => row[0]);
    });
    if (!steps.length) return;
    const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    const words = [`step ${step}`];
    for (const curve of curves) {
      const row = curve.points[newest(curve.points, step)];
      if (row && row[0] === step)
        words.push(`${curve.name}: ${row[1] === null ? "not known" : Number(row[1].toPrecision(6))}`);
    }
    const count = data.counts[newest(data.counts, step)];
    if (count) words.push(`${count[1]} device${count[1] === 1 ? "" : "s"}`);
    const left = box.left - outer.left + box.width * (step - data.low) / (data.high - data.low || 1);
    cross.hidden = tip.hidden = false;
    cross.style.left = `${left}px`;
    tip.textContent = words.join("\n");
    tip.style.left = left < outer.width / 2 ? `${left + 10}px` : "";
    tip.style.right = left < outer.width / 2 ? "" : `${outer.width - left + 10}px`;
  });
}

// As `pieces_of` has it: which box of a leaf the device at a place of a mesh holds.
function boxAt(leaf, mesh, place) {
  const coords = {};
  for (const [axis, size] of [...mesh.axes].reverse()) {
    coords[axis] = place % size;
    place = Math.floor(place / size);
  }
  const sizes = Object.fromEntries(mesh.axes);
  return leaf.shape.map((size, dim) => {
    let index = 0, count = 1;
    for (const axis of leaf.cuts[dim]) {
      if (axis !== "fsdp" && size % (sizes[axis] || 1)) continue;
      index = index * (sizes[axis] || 1) + (coords[axis] || 0);
      count *= sizes[axis] || 1;
    }
    const piece = Math.ceil(size / count);
    return { start: Math.min(index * piece, size), stop: Math.min((index + 1) * piece, size),
      from: index * piece, piece, size, full: piece * count };
  });
}

// The two dims that a picture shows: first those that are cut.
function shownDims(leaf) {
  const dims = leaf.shape.map((_, dim) => dim);
  const order = [...dims.filter((d) => leaf.cuts[d].length), ...dims.filter((d) => !leaf.cuts[d].length)];
  return order.slice(0, 2).sort((a, b) => a - b);
}

function picture(leaf, box, colour) {
  const dims = shownDims(leaf), one = { start: 0, stop: 1, from: 0, piece: 1, size: 1, full: 1 };
  const [rows, columns] = dims.length === 2 ? dims.map((d) => box[d])
    : dims.length === 1 ? [box[dims[0]], one] : [one, one];
  // No side is so short that nothing could be seen of it.
  const ratio = Math.min(3, Math.max(1 / 3, rows.full / (columns.full || 1) || 1));
  const height = ratio >= 1 ? SIDE : SIDE * ratio, width = ratio >= 1 ? SIDE / ratio : SIDE;
  const y = (n) => height * n / (rows.full || 1), x = (n) => width * n / (columns.full || 1);
  const parts = [draw("rect", { class: "tensor", width: x(columns.size), height: y(rows.size) })];
  const w = x(columns.stop - columns.start), h = y(rows.stop - rows.start);
  if (w > 0 && h > 0)
    parts.push(draw("rect", { class: "held", x: x(columns.start), y: y(rows.start), width: w, height: h, fill: colour }));
  const held = { x: x(columns.from), y: y(rows.from), w: x(columns.piece), h: y(rows.piece) };
  const low = y(Math.max(rows.from, rows.stop)), right = x(Math.max(columns.from, columns.stop));
  if (rows.stop - rows.start < rows.piece)
    parts.push(hatch(held.x, low, held.w, held.y + held.h - low));
  if (columns.stop - columns.start < columns.piece)
    parts.push(hatch(right, held.y, held.x + held.w - right, held.h));
  return draw("svg", { width: width + 2, height: height + 2, viewBox: `-1 -1 ${width + 2} ${height + 2}` }, ...parts);
}

function hatch(x, y, width, height) {
  const lines = [`M${x} ${y}h${width}v${height}h${-width}z`];
  for (let at = 4; at < width + height; at += 4) {
    const [x1, y1] = at < height ? [x, y + at] : [x + at - height, y + height];
    const [x2, y2] = at < width ? [x + at, y] : [x + width, y + at - width];
    lines.push(`M${x1} ${y1}L${x2} ${y2}`);
  }
  return draw("path", { class: "padding", d: lines.join("") });
}

function tile(leaf, mesh, place, groups) {
  const box = boxAt(leaf, mesh, place), id = mesh.ids[place];
  const cut = box.flatMap((b, dim) => (b.piece < b.full ? [[b, dim]] : []));
  const words = cut.map(([b, dim]) => (b.stop > b.start ? `dim ${dim}: ${b.start} to ${b.stop}` : `dim ${dim}: nothing`));
  const padding = cut.map(([b]) => b.piece - (b.stop - b.start)).filter((n) => n > 0);
  const others = groups.get(key(box)).filter((other) => other !== id);
  const more = others.length > 4 ? `${others.slice(0, 3).join(", ")} and ${others.length - 3} more` : others.join(", ");
  const made = make("div", "tile", make("b", "", `device ${id}`),
    picture(leaf, box, colourOf(id)),
    make("small", "box", words.join(", ") || "the whole leaf"),
    padding.length ? make("small", "pad", `${padding.join(", ")} of padding`) : null,
    others.length ? make("small", "same", `also on ${more}`) : null);
  made.dataset.device = id;
  return made;
}
const key = (box) => box.map((b) => `${b.start}:${b.from}`).join();

function showLeaf(path) {
  const leaf = data.leaves.find((each) => each.path === path);
  if (!leaf) return;
  $("choice").value = path;
  const parts = [make("div", "muted", `${leaf.dtype}[${leaf.shape.join(", ")}]`
    + (leaf.axes ? `, axes ${leaf.axes.map((a) => a ?? "–").join(" ")}` : ""))];
  for (const mesh of data.meshes) {
    const places = mesh.ids.map((_, place) => place), groups = new Map();
    for (const place of places) {
      const name = key(boxAt(leaf, mesh, place));
      groups.set(name, [...(groups.get(name) || []), mesh.ids[place]]);
    }
    const tiles = places.slice(0, MOST_TILES).map((place) => tile(leaf, mesh, place, groups));
    const more = places.length > MOST_TILES ? `, of which ${MOST_TILES} are shown` : "";
    parts.push(make("h3", "", mesh.name, make("span", "", ` ${mesh.note}${more}`)),
      make("div", "tiles", ...tiles));
  }
  $("leaf").dataset.leaf = path;
  $("leaf").replaceChildren(...parts);
}

function openHash() {
  const [name, text] = location.hash.slice(1).split(/=(.*)/s);
  if (name !== "leaf") return false;
  let path = text;
  try { path = decodeURIComponent(text); } catch { /* as it is */ }
  if (!data.leaves.some((leaf) => leaf.path === path)) return false;
  showLeaf(path);
  return true;
}

for (const chart of document.querySelectorAll(".chart[id]")) watch(chart);
if (data.leaves && data.leaves.length) {
  $("choice").append(...data.leaves.map((leaf) => {
    const option = make("option", "", `${leaf.path}  [${leaf.shape.join(", ")}]`);
    option.value = leaf.path;
    return option;
  }));
  $("chooser").hidden = false;
  $("choice").addEventListener("change", () => {
    showLeaf($("choice").value);
    history.replaceState(null, "", `#leaf=${encodeURIComponent($("choice").value)}`);
  });
  addEventListener("hashchange", openHash);
  if (!openHash()) showLeaf(data.leaf);
}
document.documentElement.dataset.ready = "yes";
