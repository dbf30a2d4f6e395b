// The dashboard: follows a run by server-sent events, and replays finished sessions at any speed.
"use strict";
(function () {
  const look = JSON.parse(document.getElementById("look").textContent);
  const $ = (id) => document.getElementById(id);
  const rows = new Map();          // "unit scheme" -> row
  const finished = new Map();      // "unit scheme" -> session, as fetched
  let compared = [];               // schemes that every unit needs to count
  let total = 0, live = null, following = true, playing = null, shown = null, viewer = null, ladder = 0, began = null, doneAtStart = 0;

  const key = (one) => one.unit_id + " " + one.scheme;
  const number = (x, digits = 3) => (x === null || x === undefined ? "–" : Math.abs(x) < 1e-9 ? "0" : String(+x.toPrecision(digits)));
  const escape = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  function size(bytes) {
    if (bytes === null || bytes === undefined) return "–";
    for (const [unit, one] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (bytes >= one) return number(bytes / one) + " " + unit;
    return Math.round(bytes) + " B";
  }

  const duration = (s) => (s < 90 ? Math.ceil(s) + " s" : Math.round(s / 60) + " min");

  // --- the current session

  function startLive(start) {
    live = {
      session: {
        ...start, ttft_s: null, met: false, status: "", why: "", distortion: null, oracle_distortion: null, oracle_levels: [],
        chunks: Array.from({ length: start.n_chunks }, (_, i) => ({ chunk: i, level: null, bytes: null, request_s: null, first_byte_s: null, last_byte_s: null, decode_start_s: null, decode_end_s: null, reason: {}, fault: null })),
        link: { t: [], capacity: [], delivered: [] },
      },
      t: [], capacity: [], step: 0, arrivals: [[0, 0]], clock: null,
    };
  }

  function news(event) {
    if (!live || key(live.session) !== key(event)) return;
    const record = event.record, chunk = live.session.chunks[record.chunk];
    if (!chunk) return;
    Object.assign(chunk, record);
    // the run's clock counts; ours only fills the time between two messages
    live.clock = Math.min(live.clock ?? Infinity, performance.now() / 1000 - event.t_s);
    const received = live.session.chunks.reduce((sum, c) => sum + (c.last_byte_s !== null ? c.bytes : c.received_bytes || 0), 0);
    const last = live.arrivals[live.arrivals.length - 1];
    if (last[0] < event.t_s) live.arrivals.push([event.t_s, received]);
    else last[1] = received;   // chunks reported together
  }

  function liveNow() {
    return live.clock === null ? 0 : performance.now() / 1000 - live.clock;
  }

  // Capacity is known in advance, arrivals up to now: one time axis for both, which grows with the session.
  function liveLink(now) {
    const { deadline_s: deadline, capacity: steps } = live.session, known = steps.length ? live.session.capacity_until_s : 0;
    for (let at = (live.t.length * deadline) / 100; at <= Math.max(2 * deadline, now + deadline / 2); at = (live.t.length * deadline) / 100) {
      while (live.step + 1 < steps.length && steps[live.step + 1][0] <= at + 1e-9) live.step++;
      live.t.push(at);
      live.capacity.push(at <= known ? steps[live.step][1] : null);
    }
    const delivered = [];
    let i = 0;
    for (const at of live.t) {
      while (i + 1 < live.arrivals.length && live.arrivals[i + 1][0] <= at) i++;
      const [t0, b0] = live.arrivals[i], next = live.arrivals[i + 1];
      delivered.push(at > now ? null : next ? b0 + ((next[1] - b0) * (at - t0)) / Math.max(next[0] - t0, 1e-9) : b0);
    }
    return { t: live.t, capacity: live.capacity, delivered };
  }

  // --- a finished session up to a moment

  function until(session, now) {
    const by = (t) => (t !== null && t <= now ? t : null);
    const chunks = session.chunks.map((c) => {
      if (c.request_s === null || c.request_s > now) return { ...c, level: null, bytes: null, request_s: null, first_byte_s: null, last_byte_s: null, decode_start_s: null, decode_end_s: null, reason: {}, fault: null };
      return { ...c, first_byte_s: by(c.first_byte_s), last_byte_s: by(c.last_byte_s), ends_s: c.last_byte_s, received_bytes: 0, decode_start_s: by(c.decode_start_s), decode_end_s: by(c.decode_end_s) };
    });
    const delivered = session.link.delivered.map((x, i) => (session.link.t[i] <= now ? x : null));
    const over = session.ttft_s !== null && session.ttft_s <= now;
    return { ...session, total_bytes: session.link.delivered[session.link.delivered.length - 1] || 0, chunks, link: { ...session.link, delivered }, ttft_s: over ? session.ttft_s : null, distortion: over ? session.distortion : null, oracle_distortion: over ? session.oracle_distortion : null, status: over ? session.status : "", oracle_levels: over ? session.oracle_levels : [] };
  }

  function length(session) {
    const last = session.link.t.length ? session.link.t[session.link.t.length - 1] : 0;
    return Math.max(session.ttft_s || 0, last, session.ttft_s === null ? session.deadline_s : 0);
  }

  // --- drawing

  function gauges(session, now) {
    const link = session.link, known = link.delivered.reduce((last, x, i) => (x !== null ? i : last), 0);
    let from = known;
    while (from > 0 && link.t[known] - link.t[from] < 0.05) from--;
    const span = link.t[known] - link.t[from];
    $("g-bytes").textContent = size(link.delivered[known] || 0);
    $("g-rate").textContent = span > 0 ? number(((link.delivered[known] - link.delivered[from]) * 8) / span / 1e6) + " Mbit/s" : "–";
    const here = session.chunks.filter((c) => c.last_byte_s !== null), done = here.filter((c) => c.decode_end_s !== null);
    $("g-chunks").textContent = `${here.length} of ${session.chunks.length}`;
    const oldest = Math.min(...here.filter((c) => c.decode_end_s === null).map((c) => c.last_byte_s));
    $("g-lag").textContent = here.length === done.length ? "none" : `${here.length - done.length} ${here.length - done.length === 1 ? "chunk" : "chunks"}, ${Math.max(0, (now - oldest) * 1000).toFixed(0)} ms`;
  }

  function draw(session, now, follow, span = null) {
    const levels = Math.max(1, session.n_levels);
    if (levels !== ladder) {
      ladder = levels;
      const fresh = $("viewer").cloneNode(false);
      $("viewer").replaceWith(fresh);
      viewer = kvViewer(fresh, { levels: look.ladders[levels], text: look.text });
    }
    viewer.show(session, { now, follow, span });
    gauges(session, now === null ? Infinity : now);
  }

  // A running session often shares its processors with this page: few redraws, and little time for them.
  const LIVE_EVERY_MS = 150, LIVE_SHARE = 0.05;

  function drawLive() {
    const began = performance.now();
    if (following && live && !document.hidden) {
      const now = liveNow();
      live.session.link = liveLink(now);
      draw(live.session, now, true, 2 * live.session.deadline_s);
      $("time").max = Math.max(now, 2 * live.session.deadline_s);
      $("time").value = now;
      $("clock").textContent = now.toFixed(2) + " s";
    }
    setTimeout(drawLive, Math.max(LIVE_EVERY_MS, (performance.now() - began) / LIVE_SHARE));
  }

  function drawPlaying() {
    const end = length(playing.session);
    const now = Math.min(playing.from + (performance.now() / 1000 - playing.at) * +$("speed").value, end);
    seek(now);
    if (now >= end) stop();
    else playing.next = requestAnimationFrame(drawPlaying);
  }

  function seek(now) {
    const end = length(shown);
    $("time").max = end;
    $("time").value = now;
    $("clock").textContent = now.toFixed(2) + " s";
    if (now >= end) draw(shown, null, false);
    else draw(until(shown, now), now, true);
  }

  function stop() {
    if (playing) cancelAnimationFrame(playing.next);
    playing = null;
    $("play").textContent = "Play";
    $("play").setAttribute("aria-pressed", "false");
  }

  function play() {
    if (!shown) return;
    const end = length(shown), from = +$("time").value >= end - 0.01 ? 0 : +$("time").value;
    playing = { session: shown, from, at: performance.now() / 1000, next: requestAnimationFrame(drawPlaying) };
    $("play").textContent = "Pause";
    $("play").setAttribute("aria-pressed", "true");
  }

  async function choose(which) {
    const row = rows.get(which);
    if (!row) return;
    if (!finished.has(which)) {
      const answer = await fetch("session?" + new URLSearchParams({ unit: row.unit_id, scheme: row.scheme }));
      if (!answer.ok) return;
      finished.set(which, await answer.json());
    }
    shown = finished.get(which);
    $("session").value = which;
    stop();
    seek(length(shown));
  }

  function follow(on) {
    following = on;
    $("live").classList.toggle("on", on);
    for (const id of ["play", "time", "speed"]) $(id).disabled = on;
    if (on) stop();
  }

  // --- the table

  function mean(values) { return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null; }

  // Units that count, as in the report: a session of every scheme, and none invalid.
  function countedUnits() {
    const units = new Map();
    for (const row of rows.values()) {
      if (row.reference) continue;
      if (!units.has(row.unit_id)) units.set(row.unit_id, new Map());
      units.get(row.unit_id).set(row.scheme, row.status);
    }
    return new Set([...units].filter(([, found]) => compared.every((name) => found.has(name)) && ![...found.values()].includes("invalid")).map(([unit]) => unit));
  }

  function table() {
    const schemes = new Map(), counted = countedUnits();
    for (const row of rows.values()) {
      if (!schemes.has(row.scheme)) schemes.set(row.scheme, []);
      schemes.get(row.scheme).push(row);
    }
    const known = (list, field) => list.map((r) => r[field]).filter((x) => x !== null && x !== undefined);
    $("table").tBodies[0].innerHTML = [...schemes].sort(([a, [x]], [b, [y]]) => !!x.reference - !!y.reference || (a < b ? -1 : 1)).map(([name, all]) => {
      const list = all.filter((r) => (r.reference ? r.status !== "invalid" : counted.has(r.unit_id))), last = all[all.length - 1];
      const ttft = list.map((r) => (r.ttft_s === null ? Infinity : r.ttft_s)).sort((a, b) => a - b);
      const median = ttft.length ? ttft[Math.floor((ttft.length - 1) / 2)] : null;
      const met = list.filter((r) => r.met).length, regret = known(list, "regret"), answers = known(list, "answers");
      return `<tr><th scope="row"><svg class="swatch" viewBox="0 0 12 12" aria-hidden="true"><circle cx="6" cy="6" r="4.5" fill="${last.hollow ? "none" : last.colour}" stroke="${last.colour}" stroke-width="2"/></svg> ${escape(name)}${last.clairvoyant ? ' <abbr title="clairvoyant: sees the future trace">*</abbr>' : ""}${last.reference ? ' <abbr title="reference line: on a few units only, compared with nothing">†</abbr>' : ""}` +
        `<td>${list.length}<td>${list.length ? met + "/" + list.length : "–"}<td>${median === null || median === Infinity ? "–" : median.toFixed(3) + " s"}<td>${number(mean(known(list, "distortion")))}` +
        `<td>${answers.length ? known(list, "answers_right").reduce((a, b) => a + b, 0) + "/" + answers.reduce((a, b) => a + b, 0) : "–"}<td>${size(mean(known(list, "bytes")))}` +
        `<td>${regret.length ? number(mean(regret)) + " (" + regret.length + ")" : "–"}<td>${all.length - list.length || "–"}<td>${last.status !== "ok" ? escape(last.status) : last.met ? "met" : "missed"}</tr>`;
    }).join("");
    $("progress").max = Math.max(total, rows.size, 1);
    $("progress").value = rows.size;
    const rest = total - rows.size, gone = rows.size - doneAtStart;
    const eta = live && gone > 0 && rest > 0 ? `, about ${duration((((performance.now() - began) / gone) * rest) / 1000)} left` : "";
    $("facts").textContent = `${rows.size} of ${Math.max(total, rows.size)} sessions${eta}`;
  }

  function list() {
    const before = $("session").value;
    $("session").replaceChildren(...[...rows.values()].map((row) => new Option(`${row.scheme} · ${row.context} · ${row.trace.split(",")[0]} · ${row.status !== "ok" ? row.status : row.met ? "met" : "missed"}`, key(row))));
    if (before) $("session").value = before;
  }

  // --- events

  function end(row) {
    rows.delete(key(row));
    rows.set(key(row), row);
    finished.delete(key(row));
    table(); list();
    if (following) choose(key(row));
    live = null;
  }

  const handlers = {
    state(event) {
      rows.clear(); finished.clear();
      $("name").textContent = event.name;
      document.title = event.name + " · kvstream dashboard";
      total = event.sessions;
      compared = event.compared;
      for (const row of event.rows) rows.set(key(row), row);
      began = performance.now(); doneAtStart = rows.size; live = null;
      if (event.current) {
        startLive(event.current.start);
        for (const one of event.current.chunks) news(one);
      }
      mode(event.live ? "live" : "finished");
      follow(event.live);
      table(); list();
      const last = [...rows.keys()].pop();
      if (last && !live) choose(last);
    },
    run_start(event) { compared = event.compared; $("name").textContent = event.name; total = event.sessions; began = performance.now(); doneAtStart = rows.size; mode("live"); follow(true); table(); },
    session_start(event) { startLive(event); mode("live"); },
    chunk: news,
    session_end(event) { end(event.row); },
    run_end() { mode("finished"); follow(false); live = null; },
  };

  function mode(words) {
    $("mode").textContent = words;
    $("live").disabled = words === "finished";
  }

  $("session").addEventListener("change", () => { follow(false); choose($("session").value); });
  $("live").addEventListener("click", () => follow(!following));
  $("play").addEventListener("click", () => (playing ? stop() : play()));
  $("speed").addEventListener("change", () => { if (playing) playing = { ...playing, from: +$("time").value, at: performance.now() / 1000 }; });
  $("time").addEventListener("input", () => { if (shown && !following) { stop(); seek(+$("time").value); } });

  const source = new EventSource("events");
  source.addEventListener("message", (message) => {
    const event = JSON.parse(message.data);
    handlers[event.event]?.(event);
  });
  source.addEventListener("error", () => { if (source.readyState !== EventSource.OPEN) $("mode").textContent = "the run's server is gone; kvstream dashboard shows it again"; });
  drawLive();
})();
