// Draws TRACE (lanes of [start us, duration us, name, kind]) on a canvas. Nested events of a lane
// get rows of their own. Events narrower than a pixel are drawn once per pixel.
"use strict";
const COLOURS = ["#4292c6", "#fd8d3c", "#bdbdbd"];
const ROW = 16, GAP = 22, TOP = 24;
const canvas = document.getElementById("view"), tip = document.getElementById("tip");
let end = 0, height = TOP;
for (const lane of TRACE.lanes) {
  const open = [];
  lane.depth = 0;
  for (const event of lane.events) {
    while (open.length && open[open.length - 1] <= event[0] + 1e-9) open.pop();
    event[4] = open.length;
    lane.depth = Math.max(lane.depth, open.push(event[0] + event[1]));
    end = Math.max(end, event[0] + event[1]);
  }
  lane.top = height + 14;
  height += lane.depth * ROW + GAP;
}
end = end || 1;
let from = 0, to = end;

function scale() { return canvas.clientWidth / (to - from); }

function draw() {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.height = height + "px";
  const g = canvas.getContext("2d");
  g.scale(ratio, ratio);
  g.font = "11px sans-serif";
  const step = Math.pow(10, Math.floor(Math.log10((to - from) / 4)));
  for (let t = Math.ceil(from / step) * step; t < to; t += step) {
    const x = (t - from) * scale();
    g.fillStyle = "#ddd";
    g.fillRect(x, 12, 1, height);
    g.fillStyle = "#555";
    g.fillText((t / 1000).toPrecision(6).replace(/\.?0+$/, "") + " ms", x + 2, 10);
  }
  for (const lane of TRACE.lanes) {
    g.fillStyle = "#000";
    const left = lane.left_out ? ` (${lane.left_out} short events left out)` : "";
    g.fillText(lane.label + left, 2, lane.top - 3);
    const drawn = [];
    for (const [start, took, name, kind, row] of lane.events) {
      if (start + took < from || start > to) continue;
      const x = Math.max(0, (start - from) * scale());
      const right = Math.min(width, (start + took - from) * scale());
      if (right < drawn[row]) continue;
      drawn[row] = Math.floor(x) + 1;
      g.fillStyle = COLOURS[kind];
      g.fillRect(x, lane.top + row * ROW, Math.max(right - x - 0.5, 0.5), ROW - 2);
      if (right - x > 30) {
        g.fillStyle = "#000";
        g.fillText(TRACE.names[name].slice(0, (right - x) / 6), x + 2, lane.top + row * ROW + 11);
      }
    }
  }
  document.body.dataset.drawn = TRACE.lanes.length;
}

function move(a, b) {
  const span = Math.min(Math.max(b - a, 0.01), end);
  from = Math.max(0, Math.min(a, end - span));
  to = from + span;
  draw();
}

canvas.addEventListener("wheel", (e) => {
  e.preventDefault();
  const at = from + e.offsetX / scale(), by = e.deltaY > 0 ? 1.25 : 0.8;
  move(at - (at - from) * by, at + (to - at) * by);
}, { passive: false });
let held = null;
canvas.addEventListener("mousedown", (e) => { held = e.offsetX; });
window.addEventListener("mouseup", () => { held = null; });
canvas.addEventListener("dblclick", () => move(0, end));
canvas.addEventListener("mousemove", (e) => {
  if (held !== null) {
    const by = (held - e.offsetX) / scale();
    held = e.offsetX;
    move(from + by, to + by);
    return;
  }
  const t = from + e.offsetX / scale(), slack = 1 / scale();
  let found = null;
  for (const lane of TRACE.lanes) {
    const row = Math.floor((e.offsetY - lane.top) / ROW);
    if (row < 0 || row >= lane.depth) continue;
    for (const event of lane.events) {
      const [start, took, , , depth] = event;
      if (depth === row && start - slack <= t && t <= start + took + slack) found = event;
    }
  }
  tip.style.display = found ? "block" : "none";
  if (!found) return;
  tip.textContent = `${TRACE.names[found[2]]} — ${found[1].toLocaleString()} µs at ` +
    `${(found[0] / 1000).toFixed(3)} ms`;
  tip.style.left = Math.min(e.clientX + 12, window.innerWidth - 320) + "px";
  tip.style.top = e.clientY + 14 + "px";
});
window.addEventListener("resize", draw);
draw();
