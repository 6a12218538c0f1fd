"use strict";
// The page: every part of the report's document where it belongs; parts that there is nothing for are left out.

const report = JSON.parse(document.getElementById("report").textContent);
const CONTEXT = 140;  // characters
const TILES = {
  fve: "of the activations' variance is in the words (FVE)",
  kl_recovered: "of the prediction is kept (KL recovered)",
  top1_agreement: "of the next tokens stay the same (top‑1)",
};

function part(name, ...children) {
  document.querySelector(`[data-part="${name}"]`).replaceChildren(...children.flat());
}

// The end of a context, which is where the token stands.
function beginningCut(text) {
  return text.length > CONTEXT ? `…${text.slice(-CONTEXT)}` : text;
}

function caseCard(of, explorer) {
  const context = make("p", {className: "context", dir: "auto"}, visible(beginningCut(of.context)), make("mark", {}, visible(of.token) || "⟨empty⟩"));
  const tops = top => top.slice(0, 3).flatMap(([token, share], index) => [index ? " · " : "", make("bdi", {}, visibleToken(token)), ` ${percent(share)}`]);
  const card = make("article", {className: "case"},
    context,
    make("p", {className: "said", dir: "auto"}, make("span", {className: "label"}, "the lens says"), make("bdi", {}, `“${visible(of.explanation.trim())}”`)),
    make("p", {className: "worth"}, `FVE ${number(of.fve)} · KL ${number(of.kl)} nats`),
    make("p", {className: "next"}, make("span", {className: "label"}, "next, original"), ...tops(of.before)),
    make("p", {className: "next"}, make("span", {className: "label"}, "next, from the words"), ...tops(of.after)));
  if (of.place && explorer) {
    const button = make("button", {type: "button"}, "show in the explorer");
    button.onclick = () => {
      document.getElementById("explorer").scrollIntoView();
      explorer.select(...of.place);
    };
    card.append(button);
  }
  return card;
}

function overview() {
  part("lead", ...report.lead.map(sentence => make("p", {}, visible(sentence))));
  const known = Object.fromEntries(report.figures.map(figure => [figure.name, figure]));
  const tiles = Object.entries(TILES).filter(([name]) => known[name]).map(([name, text]) =>
    make("div", {className: "tile"}, make("strong", {}, percent(known[name].value)), make("span", {}, text),
      make("small", {}, known[name].interval ? `${number(known[name].value, 3)}; 95%: ${span(known[name].interval, 3)}` : number(known[name].value, 3))));
  const fresh = report.readers.find(reader => reader.name === "fresh_encoder");
  if (fresh && known.fve?.value > 0) {
    tiles.push(make("div", {className: "tile"}, make("strong", {}, percent(fresh.fve / known.fve.value)),
      make("span", {}, "of the FVE is left to a reader that never met the decoder"), make("small", {}, `FVE ${number(fresh.fve, 3)}`)));
  }
  part("tiles", tiles);
  part("examples", report.examples.length
    ? [make("p", {className: "faint"}, "Held-out samples, evenly spread from high to low FVE:"), ...report.examples.map(of => caseCard(of))]
    : make("p", {className: "faint"}, "No samples."));
  const sides = {above: "Carries more than", level: "Level with", below: "Carries less than"};
  part("verdict", Object.entries(sides).filter(([side]) => report.verdict[side]?.length).map(([side, text]) =>
    make("p", {}, make("strong", {}, `${text}: `), visible(report.verdict[side].map(label => side === "above" ? label : withMeaning(label)).join(", ")), ".")));
  part("comparison", report.comparison.length
    ? comparisonPlot("FVE of what is rebuilt from the lens's text and from its controls; bars are 95% intervals", report.comparison)
    : make("p", {className: "faint"}, "No figures."));
  part("notes", report.notes.map(note => make("li", {}, visible(note))));
}

function withMeaning(label) {
  const meaning = report.comparison.find(of => of.label === label)?.meaning;
  return meaning ? `${label} (${meaning})` : label;
}

function profileCharts(title, groups) {
  const rows = name => groups.map(group => {
    const [value, low, high] = group.values[name];
    return {label: group.label, value, low, high, strong: true};
  });
  return [
    make("h3", {}, title[0].toUpperCase() + title.slice(1)),
    make("div", {className: "grid"},
      dotPlot(`FVE ${title}`, rows("fve"), {axis: "FVE", decimals: 2, zero: true}),
      dotPlot(`KL ${title}`, rows("kl"), {axis: "KL, nats", decimals: 2, zero: true}),
      dotPlot(`norm of the activation ${title}`, rows("norm"), {axis: "mean norm", decimals: 1})),
    make("details", {}, make("summary", {}, "as a table"), table(["", "tokens", "FVE", "KL, nats", "norm"],
      groups.map(group => [group.label, `${group.tokens}`, number(group.values.fve[0], 3), number(group.values.kl[0], 3), number(group.values.norm[0], 2)]), title)),
  ];
}

function trust() {
  const charts = [];
  if (report.readers.length) charts.push(comparisonPlot("The same words, read by others (FVE)", report.readers));
  if (report.best_of_n.length) {
    const lines = [["FVE", "fve"], ["KL recovered", "kl_recovered"]].map(([label, name]) => ({label, points: report.best_of_n.map(of => [of.n, of[name]])}));
    charts.push(linePlot("The best of n sampled texts", lines, {axis: "n", dots: true, scale: "log", ticks: report.best_of_n.map(of => of.n)}));
  }
  if (report.text_length.length) {
    const lines = report.text_length.map(of => ({label: of.label, points: of.tokens.map((tokens, index) => [tokens, of.fve[index]])}));
    charts.push(linePlot("FVE where the encoder reads only so many tokens", lines, {axis: "tokens read", dots: true, ticks: report.text_length[0].tokens}));
  }
  if (report.linear_probe.length) {
    const lines = [["a linear probe", "probe"], ["the lens's text", "text"], ["another row's text", "shuffled"]].map(([label, name]) =>
      ({label, points: report.linear_probe.map(of => [of.offset, of[name]])}));
    charts.push(linePlot("How often a token of the context is named", lines, {axis: "tokens before the one that is read", dots: true, ticks: report.linear_probe.map(of => of.offset), domain: [0, 1]}));
  }
  const details = report.tables.map(of => table(of.columns.map(visible), of.rows.map(row => row.map(visible)), of.title));
  return {charts, details};
}

function show() {
  overview();
  const explorer = report.explorer ? new Explorer(document.querySelector('[data-part="explorer"]'), report.explorer) : null;
  const rest = trust();
  const filled = {
    explorer: explorer !== null,
    where: report.profiles !== null && report.profiles.position.length > 0,
    cases: report.cases !== null,
    figures: report.figures.length > 0,
    checks: rest.charts.length + rest.details.length > 0,
    training: report.curves !== null,
    layers: report.heatmap !== null,
    provenance: report.provenance.length > 0,
  };
  for (const [id, there] of Object.entries(filled)) document.getElementById(id).hidden = !there;
  if (filled.where) part("profiles", profileCharts("by position in the text", report.profiles.position), profileCharts("by kind of token", report.profiles.token_class));
  if (filled.cases) part("cases", ["best", "worst"].map(kind => [make("h3", {}, kind === "best" ? "Highest FVE" : "Lowest FVE"), make("div", {className: "grid"}, ...report.cases[kind].map(of => caseCard(of, explorer)))]).flat());
  if (filled.figures) {
    part("figures", make("div", {className: "columns"},
      table(["metric", "value", "95% interval"], report.figures.map(of => [of.label, number(of.value, of.decimals), span(of.interval, of.decimals)])),
      table(["reconstructed from", "FVE", "95% interval", "KL recovered"], report.comparison.map(of =>
        [of.meaning ? `${of.label} (${of.meaning})` : of.label, number(of.fve, 3), span(of.interval, 3), number(of.kl_recovered, 3)]))));
  }
  if (filled.checks) part("checks", make("div", {className: "grid"}, ...rest.charts), make("details", {}, make("summary", {}, "as tables"), ...rest.details));
  if (filled.training) part("curves", make("div", {className: "grid"}, ...report.curves.charts.map(of => linePlot([of.title, of.unit].filter(Boolean).join(", "), of.lines, {axis: "step", stages: report.curves.stages}))));
  if (filled.layers) part("heatmap", heatmap(report.heatmap));
  if (filled.provenance) part("provenance", make("dl", {className: "facts"}, ...report.provenance.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, visible(value))])));
  const nav = document.querySelector("nav");
  for (const section of document.querySelectorAll("main > section:not([hidden])")) {
    const heading = section.querySelector("h1, h2");
    nav.append(make("a", {href: `#${section.id}`}, section.id === "overview" ? "Overview" : heading.textContent));
  }
  return explorer;
}

// auto, light, dark
function themes() {
  const button = document.getElementById("theme"), names = ["auto", "light", "dark"];
  button.onclick = () => {
    const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % names.length];
    document.documentElement.dataset.theme = next;
    button.querySelector("span").textContent = next;
    button.setAttribute("aria-label", `Colours: ${next === "auto" ? "as the system has them" : next}`);
  };
}

themes();
const explorer = show();
