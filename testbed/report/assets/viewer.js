// The session viewer: one transfer over time. Used by the report (a finished session) and by the dashboard (a session
// that grows). No dependencies but uPlot; nothing is fetched.
//
//   const viewer = kvViewer(element, look);      look = {levels: [colour...], text: colour}
//   viewer.show(session);                        a finished session
//   viewer.show(session, {now: t_s, follow: true});   a growing one, again and again; follow selects its newest chunk;
//                                                {span: s} shows so many seconds, and scrolls with now
//   viewer.show(session, {overlay: other, until: s});   with the bytes of another one on the same unit; s is the least
//                                                       that the time axis shows
"use strict";

function kvViewer(root, look) {
  const SVG = "http://www.w3.org/2000/svg";
  const LANE_HEIGHT = 26, LANE_GAP = 10;
  const SHORT = { transfer: "link", decode: "dec.", compute: "comp." };   // on narrow screens
  let over = null;                                  // another session, whose bytes are drawn beside
  let session = null, plot = null, selected = 0, nowS = null, spanS = null, untilS = 0, keep = null;

  root.innerHTML = `
    <p class="v-title" data-part="title"></p>
    <div data-part="legend"></div>
    <div data-part="plot"></div>
    <svg class="v-lanes" data-part="lanes" tabindex="0" role="application"
         aria-label="Transfers, decoding and computing of every chunk; arrow keys select a chunk"></svg>
    <div class="v-key" data-part="key"></div>
    <div class="v-strip" data-part="strip"></div>
    <p class="v-detail" data-part="detail" aria-live="polite"></p>
    <details class="v-table"><summary>All chunks</summary><div class="wide" data-part="table"></div></details>`;
  const part = Object.fromEntries([...root.querySelectorAll("[data-part]")].map((e) => [e.dataset.part, e]));

  const folded = root.querySelector("details");
  folded.addEventListener("toggle", () => { if (folded.open) table(); });

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const colour = (level) => (level === "text" ? look.text : level === null ? css("--quiet") : look.levels[level] || css("--quiet"));
  const number = (x, digits = 3) => (x === null || x === undefined ? "–" : Math.abs(x) < 1e-9 ? "0" : String(+x.toPrecision(digits)));
  const seconds = (x) => (x === null || x === undefined ? "–" : x.toFixed(3) + " s");
  const escape = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const name = (level) => (level === "text" ? "text" : level === null || level === undefined ? "–" : "level " + level);

  // Black or white, whichever can be read on a colour.
  function inkOn(hex) {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
  }

  function size(bytes) {
    if (bytes === null || bytes === undefined) return "–";
    for (const [unit, one] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (bytes >= one) return number(bytes / one) + " " + unit;
    return bytes + " B";
  }

  // A policy's reasons carry their unit in the name.
  function reason(key, value) {
    if (key.endsWith("_bps")) return `${key.slice(0, -4).replaceAll("_", " ")} ${number(value / 1e6)} Mbit/s`;
    if (key.endsWith("_bytes")) return `${key.slice(0, -6).replaceAll("_", " ")} ${size(Math.round(value))}`;
    if (key.endsWith("_s")) return `${key.slice(0, -2).replaceAll("_", " ")} ${number(value)} s`;
    return `${key.replaceAll("_", " ")} ${number(value)}`;
  }

  function reasons(chunk) {
    const words = Object.entries(chunk.reason || {}).map(([key, value]) => reason(key, value));
    if (chunk.fault) words.unshift("invalid choice of the policy (" + chunk.fault + ")");
    return words.join(", ");
  }

  // Bytes per time over windows of 10 ms, longer where 10 ms hold few packets; [t, rate] as steps. A mean over more would
  // show bytes during an outage, and more than the link carries after its rate has fallen.
  function rates(link) {
    const out = link.t.map(() => null);
    let from = 0;
    for (let i = 1; i < link.t.length; i++) {
      if (link.delivered[i] === null) continue;
      const span = link.t[i] - link.t[from], bytes = link.delivered[i] - link.delivered[from];
      const changes = link.capacity[i] !== link.capacity[i - 1];
      if (!(span >= 0.05 || (span >= 0.0095 && (bytes >= 15000 || bytes === 0)) || (changes && span >= 0.0045))) continue;
      out.fill(span > 0 ? (bytes * 8) / span / 1e6 : null, from, i);
      out[i] = out[i - 1];
      from = i;
    }
    return out;
  }

  function data() {
    const link = session.link;
    const columns = [link.t, link.capacity.map((x) => (x === null ? null : x / 1e6)), rates(link), link.delivered.map((x) => (x === null ? null : x / 1e6))];
    return over ? [...columns, bytesAt(over.link, link.t)] : columns;
  }

  // Megabytes of a link at other times than its samples'.
  function bytesAt(link, times) {
    let i = 0;
    return times.map((t) => {
      while (i + 1 < link.t.length && link.t[i + 1] <= t) i++;
      if (!link.t.length || t > link.t[link.t.length - 1] + 0.02) return null;
      return (link.delivered[i] || 0) / 1e6;
    });
  }

  // What is shown: the stretch chosen by hand, a window that goes along with a running session, or all of it.
  function view() {
    if (keep) return keep;
    const from = spanS ? Math.max(0, nowS - 0.75 * spanS) : 0;
    return [from, spanS ? from + spanS : endS()];
  }

  function endS() {
    const last = session.link.t.length ? session.link.t[session.link.t.length - 1] : 0;
    return Math.max(untilS, session.deadline_s * 1.08, (session.ttft_s || 0) * 1.03, last, nowS || 0);
  }

  function makePlot() {
    const axis = (more) => ({ stroke: () => css("--quiet"), grid: { stroke: () => css("--rule"), width: 1 }, ticks: { stroke: () => css("--rule"), width: 1 }, font: "12px system-ui, sans-serif", ...more });
    const narrow = root.clientWidth < 560;
    const rate = (u, v) => (v === null ? "" : number(v) + " Mbit/s");
    const other = over ? [{ label: `delivered, ${over.scheme}`, scale: "mb", stroke: () => css("--now"), width: 2, dash: [2, 3], value: (u, v) => (v === null ? "" : size(v * 1e6)), points: { show: false } }] : [];
    const options = {
      width: root.clientWidth,
      height: 220,
      legend: { live: true, mount: (u, legend) => part.legend.replaceChildren(legend) },
      cursor: { drag: { x: true, y: false }, points: { size: 6 } },
      scales: { x: { time: false, range: view }, mbit: { range: (u, low, high) => [0, Math.max(high || 1, 0.001) * 1.08] }, mb: { range: (u, low, high) => [0, Math.max(high || 0, (session.total_bytes || 0) / 1e6, 0.001) * 1.08] } },
      series: [
        { label: "time", value: (u, v) => (v === null ? "" : v.toFixed(2) + " s") },
        { label: "capacity", scale: "mbit", stroke: () => css("--quiet"), width: 1, fill: () => css("--capacity"), paths: uPlot.paths.stepped({ align: 1 }), value: rate, points: { show: false } },
        { label: "arriving", scale: "mbit", stroke: () => css("--accent"), width: 2, value: rate, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } },
        { label: "delivered", scale: "mb", stroke: () => css("--delivered"), width: 2, dash: [6, 4], value: (u, v) => (v === null ? "" : size(v * 1e6)), points: { show: false } },
        ...other,
      ],
      axes: [
        axis({ values: (u, splits) => splits.map((v) => +v.toFixed(3) + " s") }),
        axis({ scale: "mbit", size: narrow ? 44 : 62, label: narrow ? undefined : "Mbit/s", labelSize: 16, labelFont: "12px system-ui, sans-serif" }),
        axis({ scale: "mb", side: 1, size: narrow ? 66 : 72, values: (u, splits) => splits.map((v) => (v ? size(v * 1e6) : "0")), grid: { show: false }, label: narrow ? undefined : "delivered", labelSize: 16, labelFont: "12px system-ui, sans-serif" }),
      ],
      hooks: {
        draw: [(u) => { drawLines(u); drawLanes(u); }],
        setSelect: [(u) => {
          if (u.select.width < 4) return;
          keep = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
        }],
      },
    };
    part.plot.replaceChildren();
    plot = new uPlot(options, data(), part.plot);
    plot.over.addEventListener("dblclick", () => { keep = null; plot.setData(data()); });
  }

  function drawLines(u) {
    const ctx = u.ctx, dpr = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(u.bbox.left, 0, u.bbox.width, u.bbox.top + u.bbox.height);
    ctx.clip();
    const line = (t, stroke, dash, label) => {
      if (t === null || t === undefined) return;
      const x = Math.round(u.valToPos(t, "x", true));
      ctx.strokeStyle = ctx.fillStyle = stroke;
      ctx.lineWidth = 1.5 * dpr;
      ctx.setLineDash(dash.map((d) => d * dpr));
      ctx.beginPath();
      ctx.moveTo(x, u.bbox.top);
      ctx.lineTo(x, u.bbox.top + u.bbox.height);
      ctx.stroke();
      ctx.font = `${11 * dpr}px system-ui, sans-serif`;
      ctx.textAlign = x > u.bbox.left + u.bbox.width * 0.8 ? "right" : "left";
      const at = [label, x + (ctx.textAlign === "left" ? 4 : -4) * dpr, u.bbox.top + (label === "deadline" ? 12 : 26) * dpr];
      ctx.strokeStyle = css("--paper");   // a halo, so that lines do not cross out the words
      ctx.lineWidth = 4 * dpr;
      ctx.setLineDash([]);
      ctx.strokeText(...at);
      ctx.fillText(...at);
    };
    line(session.deadline_s, css("--ink"), [5, 4], "deadline");
    line(session.ttft_s, css("--accent"), [], "first token");
    line(nowS, css("--now"), [], "");
    ctx.restore();
  }

  function rect(x, y, width, height, attributes) {
    const node = document.createElementNS(SVG, "rect");
    for (const [key, value] of Object.entries({ x, y, width: Math.max(width, 1), height, rx: 1.5, ...attributes })) node.setAttribute(key, value);
    return node;
  }

  function label(x, y, text, anchor, klass, fill = null) {
    const node = document.createElementNS(SVG, "text");
    node.setAttribute("x", x); node.setAttribute("y", y + LANE_HEIGHT / 2 + 4); node.setAttribute("text-anchor", anchor); node.setAttribute("class", klass);
    if (fill) node.setAttribute("fill", fill);
    node.textContent = text;
    return node;
  }

  // [lane]: its upper edge.
  function lanes() {
    const names = ["transfer", "decode", "compute"];
    return Object.fromEntries(names.map((name, i) => [name, 5 + i * (LANE_HEIGHT + LANE_GAP)]));
  }

  function drawLanes(u) {
    const dpr = devicePixelRatio, left = u.bbox.left / dpr, width = u.bbox.width / dpr;
    const x = (t) => left + Math.min(Math.max(u.valToPos(t, "x"), -2), width + 2);
    const svg = part.lanes, nodes = [], lane = lanes();
    const height = 5 + Object.keys(lane).length * (LANE_HEIGHT + LANE_GAP) - LANE_GAP + 5;
    svg.setAttribute("width", u.width);
    svg.setAttribute("height", height);
    const narrow = left < 56;
    for (const [name, y] of Object.entries(lane)) {
      nodes.push(label(left - 6, y, narrow ? SHORT[name] : name, "end", "v-lane"), rect(left, y - 2, width, LANE_HEIGHT + 4, { class: "v-bed" }));
    }
    const end = nowS === null ? endS() : nowS;
    // a bar in a lane, with words on it if they fit
    const bar = (name, from, to, attributes, words, room, ink) => {
      nodes.push(rect(x(from), lane[name], x(to) - x(from) - 0.4, LANE_HEIGHT, attributes));
      if (words && x(to) - x(from) > room) nodes.push(label((x(from) + x(to)) / 2, lane[name], words, "middle", "v-digit", ink));
    };
    let free = 0, last = null;
    const order = session.chunks.filter((c) => c.request_s !== null).sort((a, b) => (a.last_byte_s ?? 1e9) - (b.last_byte_s ?? 1e9) || a.request_s - b.request_s);
    for (const chunk of order) {
      const fill = colour(chunk.level), text = chunk.level === "text", on = chunk.chunk === selected ? "v-chunk v-on" : "v-chunk";
      const look = { fill, class: on, "data-chunk": chunk.chunk };
      if (chunk.first_byte_s !== null || chunk.last_byte_s !== null) {
        const open = chunk.last_byte_s === null ? " v-open" : "";
        bar("transfer", Math.max(chunk.request_s, free), chunk.last_byte_s ?? end, { ...look, class: on + open }, text ? "T" : String(chunk.level), 13, inkOn(fill));
      }
      if (chunk.last_byte_s !== null) free = chunk.last_byte_s;
      if (chunk.decode_start_s !== null) {
        const done = chunk.decode_end_s ?? end;
        if (text) bar("compute", chunk.decode_start_s, done, { ...look, class: on + " v-recompute" }, "recompute", 84, inkOn(fill));
        else bar("decode", chunk.decode_start_s, done, look);
        if (chunk.decode_end_s !== null) last = Math.max(last ?? 0, chunk.decode_end_s);
      }
    }
    if (session.ttft_s !== null && last !== null && session.ttft_s >= last) bar("compute", last, session.ttft_s, { class: "v-prefill" }, "prefill", 42, css("--paper"));
    const mark = (t, klass) => {
      if (t === null || x(t) < left || x(t) > left + width) return;
      const node = document.createElementNS(SVG, "line");
      for (const [key, value] of Object.entries({ x1: x(t), x2: x(t), y1: 0, y2: height, class: klass })) node.setAttribute(key, value);
      nodes.push(node);
    };
    mark(session.deadline_s, "v-deadline");
    mark(nowS, "v-now");
    svg.replaceChildren(...nodes);
  }

  function title() {
    const words = [`<b>${escape(session.scheme)}</b> on ${escape(session.context)} over ${escape(session.trace.split(",")[0])}`];
    if (session.status === "failed") words.push(`failed: ${escape(session.why)}`);
    else if (session.ttft_s !== null) words.push(`first token after ${seconds(session.ttft_s)}, deadline ${number(session.deadline_s)} s ${session.met ? "met" : "missed"}`);
    if (session.status === "invalid") words.push(`invalid: ${escape(session.why)}`);
    if (session.distortion !== null && session.distortion !== undefined) {
      words.push(`distortion ${number(session.distortion)}` + (session.oracle_distortion === null || session.oracle_distortion === undefined ? "" : ` (optimum ${number(session.oracle_distortion)})`));
    }
    part.title.innerHTML = words.join(" · ");
  }

  function key() {
    const used = [...new Set(session.chunks.map((c) => c.level).concat(session.oracle_levels || []))].filter((l) => l !== null);
    used.sort((a, b) => (a === "text") - (b === "text") || a - b);
    part.key.innerHTML = used.map((l) => `<span><i style="background:${colour(l)}"></i>${name(l)}${l === 0 ? " (smallest)" : ""}</span>`).join("");
  }

  // The share of a chunk that has arrived; its bytes are known while the session runs, else only its times.
  function arrived(chunk) {
    if (chunk.last_byte_s !== null || !chunk.bytes) return 1;
    if (chunk.received_bytes) return chunk.received_bytes / chunk.bytes;
    return nowS !== null && chunk.first_byte_s !== null && chunk.ends_s ? (nowS - chunk.first_byte_s) / (chunk.ends_s - chunk.first_byte_s) : 0;
  }

  function strip() {
    const row = (head, levels, filling) => `<tr><th scope="row">${head}</th>` + session.chunks.map((c, i) => {
      const level = levels[i] ?? null;
      const here = filling ? arrived(c) : 1;
      return `<td data-chunk="${c.chunk}" class="${c.chunk === selected ? "v-on" : ""}" style="--level:${level === null ? "var(--panel)" : colour(level)};color:${level === null ? "inherit" : inkOn(colour(level))};--here:${Math.round(100 * here)}%">${level === null ? "" : level === "text" ? "T" : level}</td>`;
    }).join("") + "</tr>";
    const optimum = session.oracle_levels && session.oracle_levels.length ? row("optimum", session.oracle_levels) : "";
    part.strip.innerHTML = `<table aria-label="Level of every chunk"><tbody>${row(escape(session.scheme), session.chunks.map((c) => c.level), true)}${optimum}</tbody></table>`;
  }

  function detail() {
    const chunk = session.chunks[selected];
    if (!chunk || chunk.request_s === null) { part.detail.textContent = ""; return; }
    const optimum = session.oracle_levels && session.oracle_levels[selected] !== undefined ? ` (optimum: ${name(session.oracle_levels[selected])})` : "";
    const why = reasons(chunk);
    part.detail.textContent = `Chunk ${chunk.chunk}: ${name(chunk.level)}${optimum}, ${size(chunk.bytes)}; chosen at ${seconds(chunk.request_s)}, ` +
      `received at ${seconds(chunk.last_byte_s)}, ${chunk.level === "text" ? "recomputed" : "decoded"} at ${seconds(chunk.decode_end_s)}.` + (why ? ` Why: ${why}.` : "");
  }

  function table() {
    const rows = session.chunks.map((c, i) => `<tr data-chunk="${c.chunk}"><th scope="row">${c.chunk}<td>${name(c.level)}<td>${session.oracle_levels && session.oracle_levels[i] !== undefined ? name(session.oracle_levels[i]) : "–"}<td>${size(c.bytes)}<td>${seconds(c.request_s)}<td>${seconds(c.first_byte_s)}<td>${seconds(c.last_byte_s)}<td>${seconds(c.decode_start_s)}<td>${seconds(c.decode_end_s)}<td class="v-why">${escape(reasons(c))}</tr>`);
    part.table.innerHTML = `<table><thead><tr><th scope="col">chunk<th scope="col">level<th scope="col">optimum<th scope="col">size<th scope="col">requested<th scope="col">first byte<th scope="col">last byte<th scope="col">decode from<th scope="col">to<th scope="col">why</tr></thead><tbody>${rows.join("")}</tbody></table>`;
  }

  function select(index) {
    selected = Math.min(Math.max(index, 0), session.chunks.length - 1);
    strip(); detail();
    if (plot) drawLanes(plot);
  }

  root.addEventListener("click", (event) => {
    const hit = event.target.closest("[data-chunk]");
    if (hit) select(+hit.dataset.chunk);
  });
  part.lanes.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    select(selected + step);
  });
  new ResizeObserver(() => { if (plot && root.clientWidth && root.clientWidth !== plot.width) makePlot(); }).observe(root);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (plot) { makePlot(); strip(); } });

  return {
    show(next, { now = null, follow = false, span = null, overlay = null, until = 0 } = {}) {
      const changed = (overlay && overlay.scheme) !== (over && over.scheme);
      over = overlay;
      if (!session || session.unit_id !== next.unit_id || session.scheme !== next.scheme) { keep = null; selected = 0; }
      session = next;
      nowS = now;
      spanS = span;
      untilS = until;
      if (follow) selected = session.chunks.reduce((last, c, i) => (c.request_s !== null ? i : last), 0);
      if (plot && !changed) plot.setData(data()); else makePlot();
      root.classList.toggle("v-greyed", session.status === "invalid");
      title(); key(); strip(); detail();
      if (folded.open) table();
    },
    get selected() { return selected; },
  };
}
