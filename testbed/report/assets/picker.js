// The report's own part of the viewer: choose a unit and a scheme. The choice stands in the address, so it can be sent.
"use strict";
(function () {
  const sessions = JSON.parse(document.getElementById("session-data").textContent);
  const look = JSON.parse(document.getElementById("session-look").textContent);
  const picker = document.getElementById("picker");
  const units = [...new Set(sessions.map((s) => s.unit_id))].sort();
  let [unit, scheme] = look.first;
  let viewer = null, ladder = null;

  const select = document.createElement("select");
  select.id = "unit";
  for (const id of units) {
    const one = sessions.find((s) => s.unit_id === id);
    select.add(new Option(`${one.context} · ${one.trace} · ${one.deadline_s} s`, id));
  }
  const wrap = document.createElement("label");
  wrap.append("unit", document.createElement("br"), select);
  const schemes = document.createElement("fieldset");
  schemes.innerHTML = "<legend>scheme</legend>";
  picker.append(wrap, schemes);

  function show() {
    const here = sessions.filter((s) => s.unit_id === unit);
    const one = here.find((s) => s.scheme === scheme) || here[0];
    scheme = one.scheme;
    select.value = unit;
    schemes.replaceChildren(schemes.firstChild, ...here.map((s) => {
      const label = document.createElement("label"), input = document.createElement("input");
      input.type = "radio"; input.name = "scheme"; input.value = s.scheme; input.checked = s.scheme === scheme;
      label.append(input, s.scheme);
      return label;
    }));
    const n = String(one.n_levels);
    if (n !== ladder) {
      ladder = n;
      const root = document.getElementById("viewer"), fresh = root.cloneNode(false);
      root.replaceWith(fresh);
      viewer = kvViewer(fresh, { levels: look.ladders[n], text: look.text });
    }
    viewer.show(one);
    history.replaceState(null, "", "#" + new URLSearchParams({ unit, scheme }));
  }

  select.addEventListener("change", () => { unit = select.value; show(); });
  schemes.addEventListener("change", (event) => {
    scheme = event.target.value;
    show();
    schemes.querySelector(":checked").focus();
  });
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (units.includes(wanted.get("unit"))) { unit = wanted.get("unit"); scheme = wanted.get("scheme") || scheme; }
  show();
})();
