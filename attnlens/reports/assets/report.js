"use strict";
// The page's behaviour: Plot draws, d3 zooms, sortable sorts; here is what they are told. Text enters as text only.
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const CIRCUITS = ["qk", "ov"];
  const MARKS = {
    identity: "+", "negative identity": "−", "identity + low rank": "p", "negative identity + low rank": "n",
    "mixed diagonal": "±", "not described by this model": "?",
  };
  const COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6"].map((name) => `var(${name})`);
  const FOLD_COLOURS = { domain: ["raw", "effective", "centred", "balanced"], range: ["raw", "effective", "centred", "balanced"].map((fold) => `var(--${fold})`) };
  const FOLD_SYMBOLS = { domain: FOLD_COLOURS.domain, range: ["circle", "triangle", "square", "diamond"] };
  const HALF = (DATA.codes.length - 1) / 2;
  const LEVELS = new Map([...DATA.codes].map((code, level) => [code, level - HALF]));

  const short = d3.format(".4~g");
  const tick = d3.format("~g");
  const find = (id) => document.getElementById(id);
  const keyOf = (layer, head, circuit, fold) => `${layer}.${head}.${circuit}.${fold}`;
  const records = DATA.stats.rows.map((row) => Object.fromEntries(DATA.stats.columns.map((name, i) => [name, row[i]])));
  const byKey = new Map(records.map((r) => [keyOf(r.layer, r.head, r.circuit, r.fold), r]));
  for (const record of records) record.share = record.identity_cosine === null ? null : record.identity_cosine / record.identity_cosine_bound;
  const layers = [...new Set(records.map((r) => r.layer))];
  const layerTicks = layers.filter((_, i) => i % Math.ceil(layers.length / 12) === 0);

  // A plot is drawn again whenever the room it has, its figure's width, changes.
  const drawings = new Map();
  const observer = new ResizeObserver((changes) => {
    requestAnimationFrame(() => changes.forEach(({ target }) => drawNow(target)));  // drawing changes sizes, which it watches
  });
  function drawNow(figure) {
    const drawing = drawings.get(figure);
    const width = Math.floor(figure.clientWidth);
    if (!drawing || !width || width === drawing.width) return;
    drawing.width = width;
    drawing.drawInto(width);
  }
  function draw(box, drawInto) {
    drawings.set(box.parentElement, { width: 0, drawInto });
    observer.observe(box.parentElement);
    drawNow(box.parentElement);
  }
  function say(box, message) {
    drawings.delete(box.parentElement);
    box.replaceChildren(message);
  }

  // ---- one head ----

  function decode({ width, clip, text }) {
    const reach = Math.asinh(clip / width) / HALF;
    return Float64Array.from(text, (code) => width * Math.sinh(LEVELS.get(code) * reach));
  }

  const zooms = new Map();
  function heatmap(figure, corner) {
    const box = figure.querySelector(".plot");
    const values = decode(corner);
    const cells = Array.from(values, (value, i) => ({ row: Math.floor(i / corner.columns), column: i % corner.columns, value }));
    const color = { type: "diverging-symlog", constant: corner.width, domain: [-corner.clip, corner.clip], scheme: "RdBu", reverse: true, tickFormat: d3.format(".2~g") };
    figure.querySelector(".legend").replaceChildren(
      Plot.legend({ color: { ...color, label: "entry", ticks: [-corner.clip, 0, corner.clip] }, width: 220, height: 44, marginTop: 16, marginLeft: 20, marginRight: 20 }));
    draw(box, (room) => {
      const width = Math.min(room, 460);
      const [left, right, top, bottom] = [44, 6, 6, 34];
      const side = (width - left - right) / Math.max(corner.columns, corner.rows);
      const height = top + bottom + side * corner.rows;
      const area = [[left, top], [left + side * corner.columns, top + side * corner.rows]];
      const across = d3.scaleLinear([0, corner.columns], [area[0][0], area[1][0]]);
      const down = d3.scaleLinear([0, corner.rows], [area[0][1], area[1][1]]);
      function render(transform) {
        const x = transform.rescaleX(across).domain();
        const y = transform.rescaleY(down).domain();
        const inside = cells.filter((c) => c.column + 1 > x[0] && c.column < x[1] && c.row + 1 > y[0] && c.row < y[1]);
        box.dataset.shown = [x[0], x[1], y[0], y[1]].map((end) => end.toFixed(1)).join(" ");
        box.replaceChildren(Plot.plot({
          width, height, marginLeft: left, marginRight: width - area[1][0], marginTop: top, marginBottom: bottom,
          x: { domain: x, label: "column", labelAnchor: "center", labelArrow: "none", ticks: 6 }, color,
          y: { domain: y, label: "row", labelAnchor: "center", labelArrow: "none", reverse: true, ticks: 6 },
          marks: [
            Plot.raster(values, { width: corner.columns, height: corner.rows, imageRendering: "pixelated", clip: true }),
            Plot.frame(),
            Plot.tip(inside, Plot.pointer({
              x: (c) => c.column + 0.5, y: (c) => c.row + 0.5, maxRadius: 12,
              title: (c) => `row ${c.row}, column ${c.column}: about ${d3.format(".2g")(c.value)}`,
            })),
          ],
        }));
      }
      const zoom = d3.zoom().scaleExtent([1, 16]).extent(area).translateExtent(area)
        .filter((event) => event.type === "wheel" ? event.ctrlKey || document.activeElement === box : !event.button && !(event.touches?.length === 1))
        .on("zoom", ({ transform }) => render(transform));
      zooms.set(figure, { box: d3.select(box), zoom });
      d3.select(box).call(zoom).call(zoom.transform, d3.zoomIdentity);
    });
  }
  function steer(figure, how) {
    if (!zooms.has(figure)) return;
    const { box, zoom } = zooms.get(figure);
    const moves = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
    if (how === "in" || how === "out") box.call(zoom.scaleBy, how === "in" ? 2 : 0.5);
    else if (how === "all") box.call(zoom.transform, d3.zoomIdentity);
    else box.call(zoom.translateBy, ...moves[how].map((by) => by / d3.zoomTransform(box.node()).k));
  }
  const KEYS = { "+": "in", "=": "in", "-": "out", 0: "all", ArrowLeft: "ArrowLeft", ArrowRight: "ArrowRight", ArrowUp: "ArrowUp", ArrowDown: "ArrowDown" };
  for (const figure of document.querySelectorAll(".heatmap")) {
    for (const button of figure.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => steer(figure, button.dataset.zoom));
    figure.querySelector(".plot").addEventListener("keydown", (event) => {
      if (!(event.key in KEYS) || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      steer(figure, KEYS[event.key]);
    });
  }

  function histogram(figure, drawn, record) {
    const box = figure.querySelector(".plot");
    const caption = figure.querySelector("figcaption");
    if (!drawn.histogram) return void (say(box, "The product is not square: it has no diagonal."), caption.replaceChildren());
    const { low, high, counts } = drawn.histogram;
    const step = (high - low) / counts.length;
    const bins = counts.map((count, i) => ({ x1: low + i * step, x2: low + (i + 1) * step, count }));
    const spread = record.alpha / Math.sqrt(d3.sum(counts));
    caption.textContent = "Entries of the diagonal. Line: their mean β; band: ± root mean square of the off-diagonal entries.";
    draw(box, (width) => box.replaceChildren(Plot.plot({
      width: Math.min(width, 460), height: 170, marginLeft: 44, x: { label: "diagonal entry", ticks: Math.max(2, Math.floor(Math.min(width, 460) / 90)), tickFormat: tick }, y: { label: "entries", grid: true },
      marks: [
        Plot.rectX([spread], { x1: -spread, x2: spread, fill: "var(--faint)", fillOpacity: 0.18 }),
        Plot.rectY(bins, { x1: "x1", x2: "x2", y: "count", fill: "var(--raw)", tip: true }),
        Plot.ruleX([0], { stroke: "var(--faint)", strokeDasharray: "3 3" }),
        Plot.ruleX([record.beta], { stroke: "var(--effective)", strokeWidth: 2 }),
        Plot.ruleY([0]),
      ],
    })));
  }

  function spectrum(figure, drawn) {
    const box = figure.querySelector(".plot");
    const caption = figure.querySelector("figcaption");
    if (!drawn.singular) return void (say(box, "The spectrum of a layer's sum is not computed for a report."), caption.replaceChildren());
    const floor = 1e-6 * drawn.singular[0];
    const points = drawn.singular.map((value, i) => ({ index: i + 1, value })).filter((p) => p.value > floor);
    caption.textContent = "Singular values, largest first.";
    draw(box, (width) => box.replaceChildren(Plot.plot({
      width: Math.min(width, 460), height: 170, marginLeft: 44,
      x: { label: "index", ticks: Math.max(2, Math.floor(Math.min(width, 460) / 60)) }, y: { type: "log", label: "singular value", grid: true, ticks: 4, tickFormat: tick },
      marks: [Plot.lineY(points, { x: "index", y: "value", stroke: "var(--raw)", marker: points.length < 80 ? "dot" : "none", tip: true })],
    })));
  }

  function numbers(table, record, judged) {
    const pairs = DATA.stats.columns.slice(4).map((name) => [name, record[name]]);
    if (judged) pairs.push(...["alpha_low", "alpha_high", "beta_low", "beta_high", "p_value"].map((name) => [name, judged[name]]));
    table.replaceChildren(...pairs.map(([name, value]) => {
      const row = document.createElement("tr");
      const head = row.appendChild(document.createElement("th"));
      head.scope = "row";
      head.textContent = name;
      const cell = row.appendChild(document.createElement("td"));
      cell.className = "number";
      cell.dataset.name = name;
      cell.dataset.value = value ?? "";
      cell.textContent = value === null ? "–" : short(value);
      return row;
    }));
  }

  let chosen = null;
  function choose(layer, head, fold, { scroll = false } = {}) {
    if (!CIRCUITS.some((circuit) => byKey.has(keyOf(layer, head, circuit, fold)))) return;
    chosen = { layer, head, fold };
    find("detail-title").textContent = `Layer ${layer}, ${head === "all" ? "sum over heads" : `head ${head}`}, ${fold}`;
    for (const row of find("table").tBodies[0].rows) {
      const own = row.dataset.layer === layer && row.dataset.head === head && row.dataset.fold === fold;
      row.classList.toggle("chosen", own);
    }
    for (const circuit of CIRCUITS) {
      const key = keyOf(layer, head, circuit, fold);
      const section = find(`detail-${circuit}`);
      const [record, drawn, judged] = [byKey.get(key), DATA.drawn[key], DATA.judged[key]];
      section.hidden = !record || !drawn;
      if (section.hidden) continue;
      const verdict = document.createElement("strong");
      verdict.textContent = judged ? judged.verdict : "no verdict";
      section.querySelector(".verdict").replaceChildren(verdict, judged ? `: ${judged.reason}` : "");
      heatmap(section.querySelector(".heatmap"), drawn.corner);
      section.querySelector(".heatmap figcaption").textContent =
        `First ${drawn.corner.rows} × ${drawn.corner.columns} entries, ${fold}. Zoom with the buttons, + and −, or the wheel once it has the focus.`;
      histogram(section.querySelector(".histogram"), drawn, record);
      spectrum(section.querySelector(".spectrum"), drawn);
      numbers(section.querySelector(".numbers tbody"), record, judged);
    }
    history.replaceState(null, "", `#head=${layer}.${head}.${fold}`);
    if (scroll) find("detail").scrollIntoView({ block: "nearest" });
  }

  // ---- table ----

  const table = find("table");  // null where there are filters alone
  table?.addEventListener("click", (event) => {
    const row = event.target.closest("tbody tr");
    if (row) choose(row.dataset.layer, row.dataset.head, row.dataset.fold, { scroll: true });
  });
  function filter() {
    const [fold, layer, kind, verdict] = ["fold", "layer", "kind", "verdict"].map((id) => find(id).value);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const { layer: ownLayer, head, fold: ownFold } = row.dataset;
      const words = CIRCUITS.map((circuit) => DATA.judged[keyOf(ownLayer, head, circuit, ownFold)]?.verdict);
      row.hidden = (fold && fold !== ownFold) || (layer && layer !== ownLayer)
        || (kind && (kind === "all") !== (head === "all")) || (verdict && !words.includes(verdict));
      shown += !row.hidden;
    }
    table.classList.toggle("one-fold", Boolean(fold));
    find("empty").hidden = shown > 0;
    const every = table.tBodies[0].rows.length;
    find("shown").textContent = `${shown} of ${every} ${every === 1 ? "row" : "rows"}`;
  }
  for (const id of ["layer", "kind", "verdict"]) find(id)?.addEventListener("change", filter);
  function changeFold() {
    filter();
    maps();
    if (chosen && find("fold").value) choose(chosen.layer, chosen.head, find("fold").value);
  }
  find("fold")?.addEventListener("change", changeFold);
  for (const button of document.querySelectorAll(".reset")) {
    button.addEventListener("click", () => {
      for (const id of ["layer", "kind", "verdict"]) find(id).value = "";
      find("fold").value = [...find("fold").options].find((option) => option.defaultSelected).value;
      changeFold();
      find("fold").focus();
    });
  }

  // ---- overview, profiles ----

  const heads = (r) => r.head !== "all";
  function chosenBy(plot) {
    plot.addEventListener("click", () => {
      if (plot.value) choose(String(plot.value.layer), String(plot.value.head), plot.value.fold, { scroll: true });
    });
    return plot;
  }
  const SHARES = { type: "diverging", domain: [-1, 1], scheme: "RdBu", reverse: true };
  function colourKey(id) {
    find(id).replaceChildren(Plot.legend({ color: { ...SHARES, label: "identity cosine ÷ the largest its rank allows", ticks: [-1, -0.5, 0, 0.5, 1] }, width: 300, marginLeft: 20, marginRight: 20 }));
  }
  function mapOf(own, room, { label, rows, columns, ticks, marks = [] }) {
    return Plot.plot({
      width: Math.min(room, 60 + 70 * columns), height: 62 + Math.min(24, 420 / rows.length) * rows.length, marginLeft: 40, marginBottom: 36, padding: 0.06,
      x: { label, labelOffset: 32, labelAnchor: "center", axis: "bottom", type: "band", domain: d3.range(columns), ticks: d3.range(0, columns, Math.ceil(columns / 16)) },
      y: { label: "layer", type: "band", domain: rows, ticks }, color: SHARES,
      marks: [
        Plot.cell(own, { x: "head", y: "layer", fill: "share", tip: true, title: (r) => `layer ${r.layer}, head ${r.head}\n${short(r.share)} of the largest cosine` }),
        ...marks,
      ],
    });
  }
  function maps() {
    colourKey("map-key");
    const fold = find("fold").value || DATA.folds.at(-1);
    for (const circuit of CIRCUITS) {
      const own = records.filter((r) => r.circuit === circuit && r.fold === fold && heads(r) && r.share !== null);
      const box = find(`map-${circuit}`);
      if (!own.length) {
        say(box, `No square ${circuit.toUpperCase()} product.`);
        continue;
      }
      const mark = (r) => MARKS[DATA.judged[keyOf(r.layer, r.head, circuit, fold)]?.verdict] ?? "";
      const columns = d3.max(own, (r) => r.head) + 1;
      const written = Plot.text(own, { x: "head", y: "layer", text: mark, fill: (r) => (Math.abs(r.share) > 0.55 ? "white" : "black"), fontWeight: "bold" });
      draw(box, (room) => box.replaceChildren(chosenBy(mapOf(own, room, { label: `head (${fold})`, rows: layers, columns, ticks: layerTicks, marks: [written] }))));
    }
  }

  function add(parent, title) {
    const figure = parent.appendChild(document.createElement("figure"));
    figure.appendChild(document.createElement("figcaption")).textContent = title;
    const box = figure.appendChild(document.createElement("div"));
    box.className = "plot";
    return box;
  }
  function valueAxis(name, values) {
    const [low, high] = d3.extent(values);
    if (name === "alpha") return { type: low > 0 && high > 5 * low ? "log" : "linear", label: "α", tickFormat: tick, ticks: 5 };
    if (name === "beta") return { type: "symlog", constant: d3.median(values, Math.abs) || 1, label: "β", tickFormat: tick, ticks: 5 };
    return { label: "identity cosine ÷ bound", tickFormat: tick };
  }
  function profiles() {
    const parts = [
      ["QK, every head", (r) => r.circuit === "qk"], ["OV, every head", (r) => r.circuit === "ov" && heads(r)], ["OV, summed over heads", (r) => !heads(r)],
    ];
    for (const name of ["alpha", "beta", "share"]) {
      for (const [title, belongs] of parts) {
        const own = records.filter((r) => belongs(r) && r[name] !== null);
        if (!own.length) continue;
        const box = add(find("profile-plots"), title);
        draw(box, (width) => box.replaceChildren(chosenBy(Plot.plot({
          width, height: 220, marginLeft: 56, color: FOLD_COLOURS, symbol: FOLD_SYMBOLS,
          x: { label: "layer", ticks: layerTicks, tickFormat: "d", inset: 8 }, y: { grid: true, ...valueAxis(name, own.map((r) => r[name])) },
          marks: [
            ...(name === "alpha" ? [] : [Plot.ruleY([0])]),
            Plot.dot(own, { x: "layer", y: name, stroke: "fold", symbol: "fold", r: 2, strokeOpacity: 0.55, tip: true,
              title: (r) => `layer ${r.layer}, head ${r.head}, ${r.fold}\n${short(r[name])}` }),
            ...["effective", "centred", "balanced", "raw"].map((fold) => Plot.lineY(own.filter((r) => r.fold === fold), Plot.groupX({ y: "mean" }, {
              x: "layer", y: name, stroke: FOLD_COLOURS.range[FOLD_COLOURS.domain.indexOf(fold)], strokeWidth: 2,
              strokeDasharray: fold === "raw" ? "5 4" : null,  // where two folds coincide the broken line lies over the solid one
            }))),
          ],
        }))));
      }
    }
  }

  function headByHead({ models, maps: shares }) {
    colourKey("comparison-key");
    for (const circuit of CIRCUITS) {
      for (const model of models) {
        const own = shares.filter((r) => r.circuit === circuit && r.model === model);
        const box = add(find(`comparison-${circuit}`), `${circuit.toUpperCase()}, ${model}`);
        if (!own.length) {
          say(box, `No square ${circuit.toUpperCase()} product.`);
          continue;
        }
        const rows = [...new Set(own.map((r) => r.layer))];
        const ticks = rows.filter((_, i) => i % Math.ceil(rows.length / 12) === 0);
        draw(box, (room) => box.replaceChildren(mapOf(own, room, { label: "head", rows, columns: d3.max(own, (r) => r.head) + 1, ticks })));
      }
    }
  }

  function comparison({ models, profiles: points }) {
    const [color, symbol] = [{ domain: models, range: COLOURS }, { domain: models, range: ["circle", "triangle", "square", "diamond", "cross", "star", "wye"] }];
    find("comparison-legend").replaceChildren(Plot.legend({ color, symbol, stroke: "color", fill: "none" }));
    for (const name of ["alpha", "beta", "identity_share"]) {
      for (const circuit of CIRCUITS) {
        const own = points.filter((p) => p.circuit === circuit && p.statistic === name);
        if (!own.length) continue;
        const box = add(find("comparison-plots"), circuit === "qk" ? "QK, mean over heads" : "OV, summed over heads");
        draw(box, (width) => box.replaceChildren(Plot.plot({
          width, height: 220, marginLeft: 56, color, symbol, x: { label: "relative depth", domain: [0, 1] },
          y: { grid: true, ...valueAxis(name, own.map((p) => p.value)) },
          marks: [
            Plot.lineY(own, { x: "depth", y: "value", stroke: "model", strokeWidth: 2 }),
            Plot.dot(own, { x: "depth", y: "value", stroke: "model", symbol: "model", r: 3, tip: true }),
          ],
        })));
      }
    }
  }

  function training({ arms, points }) {
    const [color, symbol] = [{ domain: arms, range: COLOURS }, { domain: arms, range: ["circle", "triangle", "square", "diamond", "cross", "star", "wye"] }];
    find("training-legend").replaceChildren(Plot.legend({ color, symbol, stroke: "color", fill: "none" }));
    for (const [name, label] of [["accuracy", "test accuracy"], ["test_loss", "test loss"]]) {
      const own = points.filter((p) => p[name] !== null);
      if (!own.length) continue;
      const box = add(find("training-plots"), `${label} by epoch`);
      draw(box, (width) => box.replaceChildren(Plot.plot({
        width, height: 320, marginLeft: 56, color, symbol, x: { label: "epoch", tickFormat: (epoch) => (Number.isInteger(epoch) ? epoch : "") }, y: { grid: true, label, ...(name === "accuracy" ? { tickFormat: "%" } : {}) },
        marks: [
          Plot.lineY(own, { x: "epoch", y: name, stroke: "arm", z: (p) => `${p.arm} ${p.seed}`, strokeOpacity: 0.3 }),
          Plot.lineY(own, Plot.groupX({ y: "mean" }, { x: "epoch", y: name, stroke: "arm", strokeWidth: 2.5 })),
          Plot.dot(own, Plot.groupX({ y: "mean", symbol: "first" }, { x: "epoch", y: name, stroke: "arm", symbol: "arm", r: 3, tip: true })),
        ],
      })));
    }
  }

  if (table) {
    filter();
    maps();
    profiles();
  }
  if (DATA.comparison?.profiles.length) comparison(DATA.comparison);
  if (DATA.comparison?.maps.length) headByHead(DATA.comparison);
  if (DATA.training) training(DATA.training);
  const linked = /^#head=(\d+)\.(\w+)\.(\w+)$/.exec(location.hash);
  if (linked) choose(linked[1], linked[2], linked[3], { scroll: true });
  if (table && !chosen) {  // without an address, the head whose QK product is most like an identity, or the first row
    const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
    const share = ({ dataset }) => byKey.get(keyOf(dataset.layer, dataset.head, "qk", dataset.fold))?.share ?? -1;
    const first = rows[d3.greatestIndex(rows, share)];
    if (first) choose(first.dataset.layer, first.dataset.head, first.dataset.fold);
  }
})();
