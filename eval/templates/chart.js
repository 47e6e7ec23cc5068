// Draws quality against speedup from the numbers in the page, one picture for each <figure class="panel">.
const data = JSON.parse(document.getElementById("data").textContent);
const wish = new URLSearchParams(location.hash.slice(1));
const hidden = new Set();
const view = { task: 0, emphasis: null, spreads: true };
const panels = [];
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElementNS(make.space, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const html = (tag, className, ...children) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
};

const corners = { s: [4, 45, 1.25], D: [4, 0, 1.25], "^": [3, 0, 1.3], v: [3, 180, 1.3], p: [5, 0, 1.15], h: [6, 0, 1.15] };
function shape(marker, x, y, r) {
  const at = (angle, length) => {
    const turn = angle * Math.PI / 180;
    return `${(x + length * Math.sin(turn)).toFixed(2)} ${(y - length * Math.cos(turn)).toFixed(2)}`;
  };
  if (marker === "o") return `M${at(90, r)}A${r} ${r} 0 1 0 ${at(270, r)}A${r} ${r} 0 1 0 ${at(90, r)}Z`;
  if (marker === "x") return `M${at(45, r)}L${at(225, r)}M${at(135, r)}L${at(315, r)}`;
  if (marker === "1") return [180, 300, 60].map(angle => `M${x} ${y}L${at(angle, r)}`).join("");
  if (marker === "+") return `M${at(0, r)}L${at(180, r)}M${at(90, r)}L${at(270, r)}`;
  if (marker === "P") {
    const a = r * .4, b = r * 1.1;
    const path = [[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a], [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]];
    return "M" + path.map(([dx, dy]) => `${(x + dx).toFixed(2)} ${(y + dy).toFixed(2)}`).join("L") + "Z";
  }
  if (marker === "*") return "M" + [...Array(10).keys()].map(i => at(36 * i, i % 2 ? r * .55 : r * 1.35)).join("L") + "Z";
  const [count, offset, size] = corners[marker];
  return "M" + [...Array(count).keys()].map(i => at(offset + 360 * i / count, r * size)).join("L") + "Z";
}
function mark(method, x, y, r) {
  const attributes = { d: shape(method.marker, x, y, r), class: `point ${method.origin}`, stroke: method.colour };
  if (method.origin === "dita") attributes.fill = method.colour;
  return make("path", attributes);
}

function write(metric, value) {
  if (value === "identical") return value;
  return metric.share ? (100 * value).toFixed(metric.digits) + "%" : value.toFixed(metric.digits);
}
function ticks(low, high, count, logarithmic) {
  if (logarithmic) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const part of [1, 2, 5]) found.push(part * 10 ** power);
    const inside = found.filter(value => value >= low && value <= high);
    return inside.length > count ? inside.filter(value => /^1/.test(value.toExponential())) : inside;
  }
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(part => part * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(+(i * step).toPrecision(10));
  return found;
}
function scale(low, high, from, to, logarithmic = false) {
  const bend = logarithmic ? Math.log : Number;
  return value => from + (bend(value) - bend(low)) / (bend(high) - bend(low)) * (to - from);
}
// The points that no other beats in both, as in eval/plots.py.
function pareto(points, better) {
  let best = -Infinity;
  return [...points].sort((a, b) => b.x - a.x || better(b) - better(a)).filter(point => {
    const kept = better(point) > best;
    if (kept) best = better(point);
    return kept;
  }).reverse();
}

function draw(panel) {
  const metric = data.metrics.find(each => each.name === panel.select.value);
  const width = Math.max(280, panel.canvas.clientWidth), height = Math.round(Math.min(440, Math.max(300, width * .62)));
  const left = 58, right = width - 14, top = 26, bottom = height - 42;
  const here = data.points.filter(point => point.task === view.task && metric.name in point.values);
  const shown = here.filter(point => !hidden.has(point.method));
  const numbers = shown.map(point => point.values[metric.name]).filter(Number.isFinite);
  const levels = data.levels.filter(level => level.metric === metric.name && (level.task ?? view.task) === view.task);
  const near = numbers.length ? levels.map(level => level.value) : [];
  let low = Math.min(...numbers, ...near), high = Math.max(...numbers, ...near);
  if (!Number.isFinite(low)) [low, high] = [0, 1];
  const logarithmic = metric.better === "lower" && low > 0 && high > data.wide * low;
  const pad = (high - low || Math.abs(high) || 1) * .06;
  [low, high] = logarithmic ? [low / 1.25, high * 1.25] : [low - pad, high + pad];
  const speeds = shown.map(point => point.speedup);
  const slowest = Math.min(1, ...speeds), fastest = Math.max(1.5, ...speeds);
  const exact = shown.some(point => point.values[metric.name] === "identical");
  const x = scale(slowest - .03 * fastest, fastest * 1.04, left, right);
  const y = scale(low, high, bottom, exact ? top + 22 : top, logarithmic);
  const svg = panel.svg;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", `${metric.title} against speedup, ${shown.length} settings; arrow keys move between them`);
  svg.replaceChildren();
  const line = (name, x1, y1, x2, y2) => svg.append(make("line", { class: name, x1, y1, x2, y2 }));
  const text = (value, x0, y0, anchor, name = "") =>
    svg.append(make("text", { class: name, x: x0, y: y0, "text-anchor": anchor }, value));
  for (const value of ticks(slowest, fastest * 1.03, width / 75)) {
    line("grid", x(value), top, x(value), bottom);
    text(+value.toFixed(2) + "×", x(value), bottom + 17, "middle");
  }
  for (const value of ticks(low, high, height / 55, logarithmic)) {
    line("grid", left, y(value), right, y(value));
    text(metric.share ? +(100 * value).toFixed(2) + "%" : +value.toPrecision(4), left - 7, y(value) + 4, "end");
  }
  if (exact) text("identical", left - 4, top + 8, "end");
  line("axis", left, bottom, right, bottom);
  text("speedup, wall clock", (left + right) / 2, height - 6, "middle", "title");
  const better = { higher: "↑ better", lower: "↓ better", zero: "0 is best" }[metric.better];
  text(`${metric.title}, ${better}${logarithmic ? ", logarithmic" : ""}`, 2, 12, "start", "title");
  for (const level of levels.filter(each => each.value >= low && each.value <= high)) {
    line(`level ${level.kind}`, left, y(level.value), right, y(level.value));
    text(level.text, right, y(level.value) - 4, "end");
  }
  const spots = shown.map(point => {
    const value = point.values[metric.name];
    return { point, x: x(point.speedup), y: value === "identical" ? top + 5 : y(value), value };
  });
  const rank = { higher: value => value, lower: value => -value, zero: value => -Math.abs(value) }[metric.better];
  const ahead = pareto(spots, spot => (spot.value === "identical" ? Infinity : rank(spot.value)));
  if (ahead.length) {
    const path = ahead.map((spot, i) => (i ? `V${spot.y.toFixed(1)}H${spot.x.toFixed(1)}` : `M${spot.x.toFixed(1)} ${spot.y.toFixed(1)}`));
    svg.append(make("path", { class: "front", d: path.join("") }));
  }
  data.methods.forEach((method, index) => {
    const own = spots.filter(spot => spot.point.method === index).sort((a, b) => a.x - b.x);
    const faded = view.emphasis !== null && view.emphasis !== index ? " faded" : "";
    const points = own.map(spot => `${spot.x.toFixed(1)},${spot.y.toFixed(1)}`).join(" ");
    svg.append(make("polyline", { class: `link ${method.origin}${faded}`, points, stroke: method.colour }));
    for (const spot of own) {
      const ends = view.spreads && spot.point.spreads[metric.name];
      if (!ends) continue;
      const [from, to] = ends.map(end => y(Math.min(high, Math.max(low, end))).toFixed(1));
      svg.append(make("line", { class: `spread${faded}`, x1: spot.x, x2: spot.x, y1: from, y2: to, stroke: method.colour }));
    }
    for (const spot of own) {
      spot.node = mark(method, spot.x, spot.y, width < 420 ? 4 : 5);
      spot.node.dataset.row = spot.point.row;
      if (faded) spot.node.classList.add("faded");
      svg.append(spot.node);
    }
  });
  panel.spots = spots.sort((a, b) => a.x - b.x || a.y - b.y);
  panel.metric = metric;
  panel.caption.textContent = `${metric.title}: ${metric.meaning}.`;
  point_out(panel, panel.spots.find(spot => spot.point === panel.current?.point) ?? null);
}

function point_out(panel, spot) {
  panel.spots.forEach(each => each.node.classList.toggle("current", each === spot));
  panel.current = spot;
  panel.tip.hidden = spot === null;
  if (spot === null) return;
  const { point } = spot, method = data.methods[point.method], ends = point.spreads[panel.metric.name];
  const parts = [`${point.speedup.toFixed(2)}× speedup`];
  if (point.computed !== null) parts.push(`${(100 * point.computed).toFixed(0)}% of steps computed`);
  const value = write(panel.metric, spot.value) + (ends ? ` [${ends.map(end => write(panel.metric, end)).join(", ")}]` : "");
  panel.tip.replaceChildren(
    html("strong", "", method.name), html("span", "", point.label), html("span", "", `${panel.metric.title}: ${value}`),
    html("span", "soft", parts.join(", ")),
  );
  const factor = panel.canvas.clientWidth / panel.svg.viewBox.baseVal.width;
  const room = panel.canvas.clientWidth - panel.tip.offsetWidth;
  const side = spot.x * factor + 14;
  panel.tip.style.left = `${Math.max(0, side <= room ? side : side - panel.tip.offsetWidth - 28)}px`;
  panel.tip.style.top = `${Math.max(0, spot.y * factor - panel.tip.offsetHeight - 8)}px`;
}

function nearest(panel, event) {
  const box = panel.svg.getBoundingClientRect(), factor = panel.svg.viewBox.baseVal.width / box.width;
  const x = (event.clientX - box.left) * factor, y = (event.clientY - box.top) * factor;
  let best = null, least = 24;
  for (const spot of panel.spots) {
    const distance = Math.hypot(spot.x - x, spot.y - y);
    if (distance < least) [best, least] = [spot, distance];
  }
  return best;
}

function step(panel, event) {
  const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 };
  if (event.key === "Escape") point_out(panel, null);
  if (event.key === "Enter" && panel.current) document.dispatchEvent(new CustomEvent("find-row", { detail: panel.current.point.row }));
  if (!(event.key in moves) || !panel.spots.length) return;
  event.preventDefault();
  const place = panel.spots.indexOf(panel.current), count = panel.spots.length;
  point_out(panel, panel.spots[place < 0 ? 0 : (place + moves[event.key] + count) % count]);
}

function legend() {
  const box = document.querySelector(".legend");
  const kinds = [["dita", "dita"], ["peer", "other libraries"], ["baseline", "plain sampler"]];
  const press = () => {
    box.querySelectorAll("button[data-method]").forEach(b => b.setAttribute("aria-pressed", !hidden.has(+b.dataset.method)));
    panels.forEach(draw);
  };
  for (const [origin, words] of kinds) {
    const own = data.methods.map((method, index) => index).filter(index => data.methods[index].origin === origin);
    if (!own.length) continue;
    const group = html("button", "group", words);
    group.title = "show or hide all of these";
    group.onclick = () => {
      const all = own.some(index => hidden.has(index));
      own.forEach(index => (all ? hidden.delete(index) : hidden.add(index)));
      press();
    };
    const items = own.map(index => {
      const method = data.methods[index];
      const icon = make("svg", { viewBox: "0 0 16 16", "aria-hidden": "true", class: "canvas" }, mark(method, 8, 8, 5));
      icon.firstChild.style.fill = origin === "dita" ? method.colour : "none";
      const button = html("button", "", icon, method.name);
      button.dataset.method = index;
      button.onclick = () => {
        view.emphasis = null;
        if (!hidden.delete(index)) hidden.add(index);
        press();
      };
      const stress = on => () => {
        view.emphasis = on && !hidden.has(index) ? index : null;
        panels.forEach(draw);
      };
      button.onmouseenter = stress(true);
      button.onmouseleave = stress(false);
      return button;
    });
    box.append(group, html("div", "", ...items));
  }
  press();
}

function begin() {
  const figures = [...document.querySelectorAll(".panel")];
  if (!figures.length) return;
  make.space = figures[0].querySelector("svg").namespaceURI;
  (wish.get("hide") ?? "").split(",").filter(Boolean).forEach(name => {
    const index = data.methods.findIndex(method => method.name === name);
    if (index >= 0) hidden.add(index);
  });
  figures.forEach((figure, number) => {
    const panel = { spots: [], current: null };
    for (const name of ["select", "svg", "canvas", "tip", "caption"])
      panel[name] = figure.querySelector({ select: "select", svg: "svg", canvas: ".canvas", tip: ".tip", caption: "figcaption" }[name]);
    const wanted = wish.get(number ? "metric2" : "metric");
    panel.select.append(...data.metrics.map(metric => new Option(metric.title, metric.name)));
    panel.select.value = data.metrics.some(metric => metric.name === wanted) ? wanted : data.shown[number];
    panel.select.onchange = () => draw(panel);
    panel.svg.addEventListener("pointermove", event => point_out(panel, nearest(panel, event)));
    panel.svg.addEventListener("pointerleave", event => event.pointerType === "touch" || point_out(panel, null));
    panel.svg.addEventListener("blur", () => point_out(panel, null));
    panel.svg.addEventListener("keydown", event => step(panel, event));
    panel.svg.addEventListener("click", event => {
      const spot = nearest(panel, event);
      if (event.pointerType === "touch") point_out(panel, spot);
      else if (spot) document.dispatchEvent(new CustomEvent("find-row", { detail: spot.point.row }));
    });
    panels.push(panel);
  });
  const task = document.querySelector(".chart-task"), spreads = document.querySelector(".chart-spreads");
  const choose = () => {
    view.task = +(task?.value ?? 0);
    view.spreads = spreads?.checked ?? true;
    panels.forEach(draw);
  };
  if (task) task.onchange = choose;
  if (spreads) spreads.onchange = choose;
  legend();
  addEventListener("resize", () => panels.forEach(draw));
}
begin();
