// Sorts, filters and copies the leaderboard, links it to the charts, and slides over eps. All that it moves is there without it.
"use strict";
(() => {
  const one = (query) => document.querySelector(query);
  const made = (tag, more) => Object.assign(document.createElement(tag), more);
  const light = document.head.appendChild(made("style"));
  const hover = (event) => {
    const name = [...(event.target.closest?.("svg [class^=n], tr[class^=n]")?.classList ?? [])].find((c) => /^n[0-9a-f]{5}$/.test(c));
    light.textContent = name ? `.chart [class^=n]:not(.${name}) { opacity: 0.12; } .board .${name} > * { background: var(--faint); }` : "";
  };
  for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, hover);

  const table = one(".board");
  if (table) {
    const [body, heads, every] = [table.tBodies[0], [...table.tHead.rows[0].cells], one("#every")];
    const rows = [...body.rows];
    const text = (row, i) => (i ? row.cells[i] : row.querySelector("summary")).textContent.trim();
    const names = heads.map((head) => head.textContent);
    const state = () => new URLSearchParams(location.hash.slice(1));
    const number = (word) => (word === "" || isNaN(word) ? word : +word);
    const order = (a, b) => (typeof a === typeof b ? (a > b) - (a < b) : typeof a === "string" ? 1 : -1);
    const tools = one("#tools");
    const picks = {};
    const set = (name, value) => {
      const now = state();
      if (value) now.set(name, value); else now.delete(name);
      history.replaceState(null, "", `#${now}`);
      show();
    };
    const add = (name, values) => {
      const pick = made("select");
      pick.append(made("option", { value: "", textContent: `${name}: all` }), ...values.map((v) => made("option", { value: v, textContent: v })));
      pick.setAttribute("aria-label", name);
      pick.onchange = () => set(name, pick.value);
      picks[name] = pick;
      tools.append(pick, " ");
    };
    const distinct = (of) => [...new Set(rows.map(of))].sort((a, b) => order(number(a), number(b)));
    const methods = distinct((row) => row.dataset.method);
    if (methods.length > 1) add("Method", methods);
    heads.forEach((head, i) => "pick" in head.dataset && distinct((row) => text(row, i)).length > 1 && add(names[i], distinct((row) => text(row, i))));
    heads.forEach((head, i) => {
      const button = made("button", { type: "button", textContent: names[i] });
      button.onclick = () => set("sort", state().get("sort") === names[i] ? `-${names[i]}` : names[i]);
      head.replaceChildren(button);
    });
    const show = () => {
      const now = state();
      const filters = Object.keys(picks).filter((name) => now.get(name));
      for (const name in picks) picks[name].value = now.get(name) ?? "";
      if (every) every.checked = now.has("all") || filters.length > 0;
      for (const row of rows) {
        row.hidden = filters.some((name) => (name === "Method" ? row.dataset.method : text(row, names.indexOf(name))) !== now.get(name));
      }
      const [, down, by] = (now.get("sort") ?? "").match(/^(-?)(.*)$/);
      const at = names.indexOf(by);
      const key = (row) => number(row.cells[at].dataset.v ?? text(row, at));
      const sorted = at < 0 ? rows : [...rows].sort((a, b) => order(key(a), key(b)) * (down ? -1 : 1));
      body.append(...sorted);
      heads.forEach((head, i) => (i === at ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
    };
    if (every) every.onchange = () => (every.checked ? set("all", "1") : (history.replaceState(null, "", "#"), show()));
    const quote = (word) => (/[",]/.test(word) ? `"${word.replaceAll('"', '""')}"` : word);
    const forms = {
      CSV: (lines) => lines.map((line) => line.map(quote).join(",")).join("\n"),
      Markdown: ([head, ...rest]) => [head, head.map(() => "---"), ...rest].map((line) => `| ${line.map((w) => w.replaceAll("|", "\\|")).join(" | ")} |`).join("\n"),
      LaTeX: (lines) => `\\begin{tabular}{${"l".repeat(lines[0].length)}}\n${lines.map((line) => line.map((w) => w.replace(/[&%$#_{}]/g, "\\$&")).join(" & ") + " \\\\").join("\n")}\n\\end{tabular}`,
    };
    for (const form in forms) {
      const button = made("button", { type: "button", textContent: `Copy ${form}` });
      button.onclick = () => {
        const shown = [...body.rows].filter((row) => row.offsetParent);
        const lines = [names, ...shown.map((row) => names.map((_, i) => text(row, i).replace(/\s+/g, " ")))];
        const box = one("#copied");
        box.hidden = false;
        box.value = forms[form](lines);
        box.select();
        document.execCommand("copy");
      };
      tools.append(button, " ");
    }
    tools.hidden = false;
    window.addEventListener("hashchange", show);
    show();
  }

  const strips = [...document.querySelectorAll("#examples .strip")];
  const place = one("#slide");
  if (place && strips.length > 1) {
    const slider = made("input", { type: "range", min: 0, max: strips.length - 1, value: strips.length >> 1 });
    const said = made("output");
    slider.setAttribute("aria-label", "eps");
    const slide = () => {
      strips.forEach((strip, i) => (strip.hidden = i !== +slider.value));
      said.textContent = ` ε = ${strips[slider.value].dataset.eps}/255`;
    };
    slider.oninput = slide;
    place.append("ε ", slider, said);
    place.hidden = false;
    slide();
    window.addEventListener("beforeprint", () => strips.forEach((strip) => (strip.hidden = false)));
    window.addEventListener("afterprint", slide);
  }
})();
