"use strict";
// What the tuned lens and the norm lens would say next at every layer and token of one text.

const BITS = 8;  // of KL: the darkest colour

function heatmap(data) {
  const names = Object.keys(data.lenses), details = make("p", {className: "detail", "aria-live": "polite"});
  const grid = make("table", {className: "heat", "data-quantity": "kl"});
  const choices = names.map((name, index) => {
    const input = make("input", {type: "radio", name: "layer-lens", value: name, checked: index === names.length - 1});
    input.onchange = () => fill(name);
    return make("label", {}, input, ` ${data.labels[name]}`);
  });

  function describe(cell, position) {
    const tops = [];
    for (let index = 0; index < cell.top.length; index += 2) tops.push(`${data.words[cell.top[index]]} ${percent(cell.top[index + 1])}`);
    details.textContent = `Layer ${cell.layer} after “${data.tokens[position]}”: ${tops.join(" · ")}; KL ${number(cell.kl)} bits`;
  }

  function fill(name) {
    const head = make("tr", {}, make("th", {scope: "col"}, "layer"), ...data.tokens.map(token => make("th", {scope: "col"}, make("bdi", {}, token))));
    const rows = [...data.lenses[name]].reverse().map(line => make("tr", {}, make("th", {scope: "row"}, `${line[0].layer}`),
      ...line.map((cell, position) => {
        const level = Math.round(Math.min(1, cell.kl / BITS) * (LEVELS - 1));
        const td = make("td", {className: `level-${level}`, tabindex: position === 0 ? "0" : "-1"}, make("bdi", {}, data.words[cell.top[0]]));
        td.onpointerenter = td.onfocus = () => describe(cell, position);
        return td;
      })));
    grid.replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
    const last = data.lenses[name].at(-1);
    describe(last.at(-1), last.length - 1);
  }

  grid.addEventListener("keydown", event => {
    const cell = event.target, row = cell.parentElement, column = cell.cellIndex;
    const next = {
      ArrowRight: cell.nextElementSibling, ArrowLeft: cell.previousElementSibling,
      ArrowDown: row.nextElementSibling?.cells[column], ArrowUp: row.previousElementSibling?.cells[column],
      Home: row.cells[1], End: row.cells[row.cells.length - 1],
    }[event.key];
    if (next?.tagName !== "TD") return;
    event.preventDefault();
    next.focus();
  });
  fill(names.at(-1));
  return [
    make("p", {className: "faint"}, "In each cell what the lens puts first after that layer (last layer on top), coloured by KL to the model's own prediction: ",
      `white is 0, the strongest colour ${BITS} bits or more.`),
    make("fieldset", {}, make("legend", {}, "Lens"), ...choices),
    make("div", {className: "scroll"}, grid), details,
  ];
}
