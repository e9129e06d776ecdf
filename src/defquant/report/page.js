// Draws the charts live where the browser can; where it cannot, the pictures and tables stay.
"use strict";
(async () => {
  const packed = document.getElementById("vega");
  if (!packed || !window.DecompressionStream || !window.IntersectionObserver) return;
  const bytes = Uint8Array.from(atob(packed.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.type = "module";
  script.textContent = await new Response(stream).text();
  const ready = new Promise((done) => window.addEventListener("vega", done, { once: true }));
  document.head.append(script);
  await ready;
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  const show = async (chart) => {
    const spec = JSON.parse(chart.querySelector("script").textContent);
    const fit = Math.max(1, Math.floor(chart.clientWidth / 310));
    if (spec.columns) spec.columns = Math.min(spec.columns, fit);
    spec.config.legend.columns = fit;
    const one = spec.spec ?? spec;
    one.width = Math.min(one.width, Math.max(180, chart.clientWidth - 80));
    const place = document.createElement("div");
    // ast: expressions are interpreted, as the page's policy forbids eval
    const options = { mode: "vega-lite", ast: true, actions: false, renderer: "svg", tooltip: { theme: dark ? "dark" : "light" } };
    await window.draw(place, spec, options);
    chart.replaceChildren(place);
  };
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      seen.unobserve(entry.target);
      show(entry.target);
    }
  }, { rootMargin: "300px" });
  document.querySelectorAll(".chart").forEach((chart) => seen.observe(chart));
})();
