"use strict";
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const digitsOf = (value, digits) => (value == null ? "-" : value !== 0 && Math.abs(value) < 0.5 * 10 ** -digits
  ? value.toExponential(1) : value.toFixed(Number.isInteger(value) && Math.abs(value) >= 10 ? 0 : digits));
const onAxis = (value) => (value == null ? "" : value !== 0 && Math.abs(value) < 0.001 ? value.toExponential() : String(Number(value.toPrecision(6))));
const dataOf = (element) => JSON.parse(element.querySelector("script").textContent);
const added = (parent, kind, name) => {
  const element = document.createElement(kind);
  if (name) element.className = name;
  return parent.appendChild(element);
};

function chart(figure) {
  const data = dataOf(figure), box = added(figure, "div", "plot");
  const tip = data.marks.length ? added(figure, "p", "tip") : null;
  const quiet = data.marks.length ? `Dotted: growth or a new verdict (${data.marks.length}). Point at one to see why.` : "";
  const lastOf = (values) => values.reduce((last, value, at) => (value == null ? last : at), null);
  const lasts = [data.steps.length - 1, ...data.series.map((line) => lastOf(line.values))]; // lines may end early
  const marks = (plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = colour("--bad"); ctx.lineWidth = devicePixelRatio; ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const mark of data.marks) {
      const x = plot.valToPos(mark.step, "x", true);
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
    }
    ctx.restore();
  };
  const near = (plot) => {
    const at = plot.cursor.left;
    if (at < 0) plot.setLegend({ idxs: lasts }, false);
    if (!tip) return;
    const found = at < 0 ? [] : data.marks.filter((mark) => Math.abs(plot.valToPos(mark.step, "x") - at) < 8);
    tip.textContent = found.length ? found.map((mark) => `step ${mark.step}: ${mark.text}`).join("; ") : quiet;
  };
  let plot = null;
  const draw = () => {
    if (plot) plot.destroy();
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    const few = data.steps.length < 40;
    plot = new uPlot({
      width: Math.max(box.clientWidth, 200), height: 230,
      scales: { x: { time: false }, y: { distr: data.logarithmic ? 3 : 1,
        ...(data.zero ? { range: (_, low, high) => [0, high > 0 ? high * 1.08 : 1] } : {}) } },
      axes: [{ ...axis, label: data.x, labelSize: 20, labelFont: "12px system-ui", size: 34 }, { ...axis, size: 62, values: (_, ticks) => ticks.map(onAxis) }],
      series: [{ label: data.x }, ...data.series.map((line, at) => ({
        label: line.name, stroke: colour(`--c${at % 8}`), width: 2, spanGaps: true, dash: at >= 8 ? [6, 4] : undefined,
        points: { show: few, size: 4, fill: colour(`--c${at % 8}`) }, value: (_, value) => digitsOf(value, data.decimals),
        ...(data.stairs ? { paths: uPlot.paths.stepped({ align: 1 }) } : {}) }))],
      cursor: { drag: { setScale: true, x: true, y: false } },
      hooks: { draw: [marks], setCursor: [near] },
    }, [data.steps, ...data.series.map((line) => line.values)], box);
    near(plot);
  };
  draw();
  new ResizeObserver(() => box.clientWidth && plot.width !== box.clientWidth && plot.setSize({ width: Math.max(box.clientWidth, 200), height: 230 })).observe(box);
  figure.redraw = draw;
}

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const mixed = (from, to, share) => `rgb(${from.map((value, at) => Math.round(value + (to[at] - value) * share)).join(",")})`;

function heat(figure) {
  const data = dataOf(figure), canvas = added(figure, "canvas"), context = canvas.getContext("2d");
  canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", figure.querySelector("figcaption").textContent);
  const largest = data.frames.flatMap((frame) => frame.rows.flat()).reduce((most, value) => Math.max(most, value ?? 0), 1e-12);
  if (data.columns.length > 64 || data.rows.length > 24) figure.classList.add("wide");
  let frame = data.frames.length - 1, slider = null, moment = null;
  if (data.frames.length > 1) {
    const label = added(figure, "label");
    slider = added(label, "input"); slider.type = "range"; slider.max = frame; slider.value = frame;
    slider.setAttribute("aria-label", "step"); moment = added(label, "span");
    slider.oninput = () => { frame = +slider.value; draw(); };
  }
  const tip = added(figure, "p", "tip");
  const quiet = data.even ? "Neutral: an even share; blue: less, down to 1/8; orange: more, up to 8; dotted: below 0.1. Point at a cell for its number."
    : `Down: ${data.row}; across: ${data.column}. From 0 to ${digitsOf(largest, 2)}. Point at a cell for its number.`;
  tip.textContent = quiet;
  const longest = Math.max(...data.rows.map((name) => name.length));
  const place = () => {
    const width = Math.max(figure.clientWidth - 20, 200), left = Math.min(8 + 6.6 * longest, width * 0.4);
    const high = Math.max(6, Math.min(24, 900 / data.rows.length));
    return { width, left, high, wide: (width - left) / data.columns.length, height: high * data.rows.length + 20 };
  };
  const shade = (value, low, even, high) => {
    if (!data.even) return mixed(even, low, Math.min(1, value / largest));
    const at = Math.max(-1, Math.min(1, Math.log2(Math.max(value, 1e-9)) / 3));
    return at < 0 ? mixed(even, low, -at) : mixed(even, high, at);
  };
  const draw = () => {
    const { width, left, high, wide, height } = place(), ratio = devicePixelRatio || 1;
    canvas.width = width * ratio; canvas.height = height * ratio; canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const [low, even, top] = ["--low", "--even", "--high"].map((name) => rgb(colour(name)));
    const gap = wide > 6 && high > 6 ? 1 : 0;
    data.frames[frame].rows.forEach((row, y) => row.forEach((value, x) => {
      if (value == null) return;
      context.fillStyle = shade(value, low, even, top);
      context.fillRect(left + x * wide, y * high, Math.max(wide - gap, 0.5), high - gap);
      if (data.even && value < 0.1 && wide > 4) {
        context.fillStyle = colour("--paper");
        context.fillRect(left + (x + 0.5) * wide - 2, (y + 0.5) * high - 2, 3, 3);
      }
    }));
    context.fillStyle = colour("--soft"); context.font = "11px system-ui"; context.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(12 / high)), room = Math.floor((left - 6) / 6.2);
    data.rows.forEach((name, y) => y % every === 0 && context.fillText(name.length > room ? `${name.slice(0, room - 1)}\u2026` : name, 0, y * high + high / 2));
    const size = 7 * Math.max(...data.columns.map((name) => name.length)) + 6, skip = Math.max(1, Math.ceil(size / wide));
    context.textAlign = "center";
    data.columns.forEach((name, x) => x % skip === 0 && context.fillText(name, left + (x + 0.5) * wide, height - 9));
    context.textAlign = "left";
    if (moment) moment.textContent = data.frames[frame].name;
  };
  canvas.onpointermove = (event) => {
    const { left, high, wide } = place(), x = Math.floor((event.offsetX - left) / wide), y = Math.floor(event.offsetY / high);
    const value = data.frames[frame].rows[y]?.[x];
    if (x < 0 || value == null) { tip.textContent = quiet; return; }
    const share = data.even ? `${digitsOf(value, 2)} of an even share` : digitsOf(value, 3);
    tip.textContent = `${data.row} ${data.rows[y]}, ${data.column} ${data.columns[x]}: ${share}`;
  };
  canvas.onpointerleave = () => { tip.textContent = quiet; };
  draw();
  new ResizeObserver(draw).observe(figure);
  figure.redraw = draw;
}

const hue = (expert) => Math.round(expert * 137.508) % 360;

function words(box) {
  const data = dataOf(box), tokens = [...box.querySelectorAll(".sample span")], names = Object.keys(data.layers);
  const label = document.createElement("label"), select = added(label, "select"), chips = document.createElement("div");
  chips.className = "chips";
  names.forEach((name) => { const option = added(select, "option"); option.value = option.textContent = name; });
  select.value = data.opened; select.setAttribute("aria-label", "layer");
  const tip = document.createElement("p"), quiet = "Point at one for its experts and gates.", sample = box.querySelector(".sample");
  tip.className = "tip"; tip.textContent = quiet;
  box.querySelector("h3").after(label, chips, tip);
  sample.onpointerover = (event) => { const token = event.target.closest(".sample span"); tip.textContent = (token && token.dataset.told) || quiet; };
  const draw = () => {
    const chosen = data.layers[select.value], used = new Set();
    tokens.forEach((token, at) => {
      const choices = chosen[at] ?? [];
      token.style.background = choices.length ? "" : "none";
      if (choices.length) { token.style.setProperty("--h", hue(choices[0][0])); used.add(choices[0][0]); }
      token.dataset.told = choices.map(([expert, gate]) => `expert ${expert}: gate ${gate}`).join(", ");
      token.title = token.dataset.told.replaceAll(", ", "\n");
    });
    chips.replaceChildren();
    [...used].sort((a, b) => a - b).forEach((expert) => { const chip = added(chips, "span"); chip.textContent = expert; chip.style.setProperty("--h", hue(expert)); });
  };
  select.onchange = draw;
  draw();
}

// what is folded has no size yet: it is drawn when it is opened
const drawn = new WeakSet();
const drawAll = (root) => root.querySelectorAll("figure.chart, figure.heat, div.words").forEach((element) => {
  if (drawn.has(element) || element.closest("details:not([open])")) return;
  drawn.add(element);
  (element.matches(".chart") ? chart : element.matches(".heat") ? heat : words)(element);
});
document.querySelectorAll("details").forEach((fold) => fold.addEventListener("toggle", () => drawAll(fold)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.querySelectorAll("figure").forEach((figure) => figure.redraw?.()));
drawAll(document);
