// The report's part of the viewer: choose a unit and a scheme, and one to compare with, which stands below. The choice is kept in the URL, so it can be shared.
"use strict";
(function () {
  const sessions = JSON.parse(document.getElementById("session-data").textContent);
  const look = JSON.parse(document.getElementById("session-look").textContent);
  const picker = document.getElementById("picker");
  const units = [...new Set(sessions.map((s) => s.unit_id))].sort();
  let [unit, scheme] = look.first;
  let beside = "";
  const viewers = {};   // [id of an element]: {ladder, viewer}

  const select = document.createElement("select");
  select.id = "unit";
  for (const id of units) {
    const one = sessions.find((s) => s.unit_id === id);
    const from = one.offset_s ? ` from ${one.offset_s} s` : "";
    select.add(new Option(`${one.context} · ${one.trace}${from} · ${one.deadline_s} s`, id));
  }
  const wrap = document.createElement("label");
  wrap.append("unit", document.createElement("br"), select);
  const schemes = document.createElement("fieldset");
  schemes.innerHTML = "<legend>scheme</legend>";
  const other = document.createElement("select"), below = document.createElement("label");
  other.id = "beside";
  below.append("and below it", document.createElement("br"), other);
  picker.append(wrap, schemes, below);

  // A viewer has the colours of one number of levels.
  function viewerOf(id, one) {
    const n = String(one.n_levels);
    if (!viewers[id] || viewers[id].ladder !== n) {
      const root = document.getElementById(id), fresh = root.cloneNode(false);
      root.replaceWith(fresh);
      viewers[id] = { ladder: n, viewer: kvViewer(fresh, { levels: look.ladders[n], text: look.text }) };
    }
    return viewers[id].viewer;
  }

  function show() {
    const here = sessions.filter((s) => s.unit_id === unit);
    const one = here.find((s) => s.scheme === scheme) || here[0];
    scheme = one.scheme;
    select.value = unit;
    schemes.replaceChildren(schemes.firstChild, ...here.map((s) => {
      const label = document.createElement("label"), input = document.createElement("input");
      input.type = "radio"; input.name = "scheme"; input.value = s.scheme; input.checked = s.scheme === scheme;
      label.append(input, s.status === "ok" ? s.scheme : `${s.scheme} (${s.status})`);
      return label;
    }));
    const rest = here.filter((s) => s !== one), second = rest.find((s) => s.scheme === beside) || null;
    other.replaceChildren(new Option("nothing", ""), ...rest.map((s) => new Option(s.scheme, s.scheme)));
    other.value = second ? beside : "";
    const until = second ? Math.max(...[one, second].map((s) => (s.ttft_s || 0) * 1.03)) : 0;   // one axis for both
    viewerOf("viewer", one).show(one, { overlay: second, until });
    document.getElementById("viewer-below").hidden = !second;
    if (second) viewerOf("viewer-below", second).show(second, { until });
    history.replaceState(null, "", "#" + new URLSearchParams({ unit, scheme, ...(second ? { beside } : {}) }));
  }

  select.addEventListener("change", () => { unit = select.value; show(); });
  schemes.addEventListener("change", (event) => {
    scheme = event.target.value;
    show();
    schemes.querySelector(":checked").focus();
  });
  other.addEventListener("change", () => { beside = other.value; show(); });
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (units.includes(wanted.get("unit"))) { unit = wanted.get("unit"); scheme = wanted.get("scheme") || scheme; beside = wanted.get("beside") || ""; }
  show();
})();
