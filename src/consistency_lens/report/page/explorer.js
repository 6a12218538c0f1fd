"use strict";
// Texts as tokens coloured by what the lens makes of them, and a panel that says the rest of one token.

const LEVELS = 9;
const BLOCK = 160, BLOCK_AT_MOST = 260;  // tokens; the browser leaves out blocks that are not in view
const QUANTITIES = {
  fve: {label: "FVE", low: "≤ 0: the words carry nothing", high: "1: all of it", unit: "", decimals: 2},
  kl: {label: "KL", low: "0: it predicts the same", high: "or more", unit: " nats", decimals: 2},
  norm: {label: "norm", low: "or less", high: "or more", unit: "", decimals: 1},
};

function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

class Explorer {
  // explorer: see consistency_lens/report/explorer.py; root: an empty element.
  constructor(root, explorer) {
    this.explorer = explorer;
    this.quantity = "fve";
    this.places = new Map();  // token's element -> [text, token]
    this.flow = make("div", {className: "flow"});
    this.panel = make("aside", {className: "panel", "aria-label": "The token's explanation"});
    this.said = make("p", {className: "unseen", "aria-live": "polite"});
    this.legend = make("div", {className: "scale"});
    this.domains = this.measure();
    root.replaceChildren(this.toolbar(), make("div", {className: "explorer"}, this.flow, this.panel), this.said, this.help());
    this.texts = explorer.texts.map((text, index) => this.addText(text, index));
    this.listen();
    this.colour();
    this.select(0, this.mostTelling(), false);
  }

  // The range of each quantity's colours: outliers do not stretch it.
  measure() {
    const sorted = name => this.explorer.texts.flatMap(text => text[name]).sort((a, b) => a - b);
    const kl = sorted("kl"), norm = sorted("norm");
    return {fve: [0, 1], kl: [0, quantile(kl, 0.98) || 1], norm: [quantile(norm, 0.02), quantile(norm, 0.98)]};
  }

  // In the first text the longest explanation that carries more than half: something to look at when the page opens.
  mostTelling() {
    const text = this.explorer.texts[0];
    const worth = text.fve.map((fve, token) => (fve > 0.5 ? 1 : 0) + text.explanations[token].join("").length / 1000 + token / 1e6);
    return worth.indexOf(Math.max(...worth));
  }

  toolbar() {
    this.choice = make("select", {"aria-label": "Text"});
    this.explorer.texts.forEach((text, index) => this.choice.append(make("option", {value: index}, `${index + 1}. ${visible(text.title)}`)));
    this.choice.onchange = () => this.select(Number(this.choice.value), 0);
    const choices = Object.entries(QUANTITIES).map(([name, {label}], index) => {
      const input = make("input", {type: "radio", name: "quantity", value: name, checked: index === 0});
      input.onchange = () => this.setQuantity(name);
      return make("label", {}, input, ` ${label}`);
    });
    const colours = make("fieldset", {}, make("legend", {}, "Colour"), ...choices);
    return make("div", {className: "toolbar"}, make("label", {className: "texts"}, "Text ", this.choice), colours, this.legend);
  }

  help() {
    return make("p", {className: "faint"}, `${this.explorer.source}. Point at a token or tap it; with the keyboard: ← → ↑ ↓ move, `,
      "Home and End lead to the ends of a text, j and k to the next text and the one before, c changes the colour.");
  }

  // Adds a text in blocks of plain text. A block's tokens become elements when it comes into view or is asked for: a
  // page of many texts opens at once, and the browser's own search finds all of them.
  addText(text, index) {
    const list = make("div", {role: "listbox", "aria-label": `Text ${index + 1}: ${visible(text.title)}`, "aria-orientation": "horizontal", dir: "auto"});
    const pieces = text.tokens.map(place => this.explorer.words[place]), blocks = [];
    for (let from = 0; from < pieces.length;) {
      let to = Math.min(from + BLOCK, pieces.length);
      while (to < Math.min(from + BLOCK_AT_MOST, pieces.length) && !/[\n.!?。]/.test(pieces[to - 1])) to++;
      const element = make("div", {className: "block", role: "group"}, pieces.slice(from, to).map(piece => clipped(piece)).join(""));
      const block = {element, from, to, tokens: null};
      element.addEventListener("contentvisibilityautostatechange", event => {
        if (!event.skipped) this.fill(index, block);
      });
      list.append(element);
      blocks.push(block);
      from = to;
    }
    this.flow.append(make("section", {className: "text"}, make("h3", {}, `${index + 1}. `, foreign(text.title)), list));
    return {blocks, length: pieces.length};
  }

  fill(index, block) {
    if (block.tokens) return;
    const text = this.explorer.texts[index];
    block.tokens = [];
    for (let token = block.from; token < block.to; token++) {
      const element = make("span", {role: "option", tabindex: "-1", "aria-selected": "false"}, visibleInFlow(this.explorer.words[text.tokens[token]]));
      this.places.set(element, [index, token]);
      block.tokens.push(element);
    }
    this.colourBlock(index, block);
    block.element.replaceChildren(...block.tokens);
  }

  // The element of a token; undefined where there is no such token.
  element(text, token) {
    const block = this.texts[text]?.blocks.find(of => of.from <= token && token < of.to);
    if (!block) return undefined;
    this.fill(text, block);
    return block.tokens[token - block.from];
  }

  listen() {
    this.flow.addEventListener("pointerover", event => {
      const place = this.places.get(event.target);
      if (place && event.pointerType !== "touch") this.show(...place);
    });
    this.flow.addEventListener("pointerleave", () => this.show(...this.current));
    this.flow.addEventListener("click", event => {
      const place = this.places.get(event.target);
      if (place) this.select(...place);
    });
    this.flow.addEventListener("keydown", event => this.key(event));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [text, token] = this.current, last = this.texts[text].length - 1;
    const moves = {
      ArrowRight: () => token < last ? [text, token + 1] : [text + 1, 0],
      ArrowLeft: () => token > 0 ? [text, token - 1] : [text - 1, this.texts[text - 1]?.length - 1],
      ArrowDown: () => this.nearestLine(1),
      ArrowUp: () => this.nearestLine(-1),
      Home: () => [text, 0],
      End: () => [text, last],
      j: () => [text + 1, 0],
      k: () => [text - 1, 0],
    };
    if (event.key === "c") {
      const names = Object.keys(QUANTITIES);
      this.setQuantity(names[(names.indexOf(this.quantity) + 1) % names.length]);
    } else if (event.key in moves) {
      const [nextText, nextToken] = moves[event.key]();
      if (this.element(nextText, nextToken)) this.select(nextText, nextToken);
    } else return;
    event.preventDefault();
  }

  // The token above or below the current one, over the border of a text too.
  nearestLine(step) {
    const centre = box => (box.left + box.right) / 2;
    const here = this.element(...this.current).getBoundingClientRect();
    let [text, token] = this.current, line = null, best = this.current, nearest = Infinity;
    for (;;) {
      token += step;
      if (!this.element(text, token)) {
        text += step;
        if (!this.texts[text]) return best;
        token = step > 0 ? 0 : this.texts[text].length - 1;
      }
      const box = this.element(text, token).getBoundingClientRect();
      if (Math.abs(box.top - here.top) < here.height / 2) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) >= here.height / 2) return best;
      const distance = Math.abs(centre(box) - centre(here));
      if (distance < nearest) [nearest, best] = [distance, [text, token]];
    }
  }

  setQuantity(name) {
    this.quantity = name;
    for (const input of document.getElementsByName("quantity")) input.checked = input.value === name;
    this.colour();
    this.said.textContent = `coloured by ${QUANTITIES[name].label}`;
  }

  colour() {
    const [low, high] = this.domains[this.quantity], {label, unit, decimals} = QUANTITIES[this.quantity];
    this.flow.dataset.quantity = this.legend.dataset.quantity = this.quantity;
    this.texts.forEach((text, index) => text.blocks.filter(block => block.tokens).forEach(block => this.colourBlock(index, block)));
    const swatches = Array.from({length: LEVELS}, (_, level) => make("span", {className: `step level-${level}`}));
    const ends = QUANTITIES[this.quantity];
    const lowText = this.quantity === "norm" ? `${number(low, decimals)} ${ends.low}` : ends.low;
    const highText = this.quantity === "fve" ? ends.high : `${number(high, decimals)}${unit} ${ends.high}`;
    this.legend.replaceChildren(make("span", {}, `${label}${lowText ? ` ${lowText}` : ""}`), make("span", {className: "steps", "aria-hidden": "true"}, ...swatches), make("span", {}, highText));
  }

  colourBlock(index, block) {
    const [low, high] = this.domains[this.quantity], values = this.explorer.texts[index][this.quantity];
    block.tokens.forEach((element, place) => {
      const value = values[block.from + place], share = Math.min(1, Math.max(0, (value - low) / (high - low || 1)));
      const below = this.quantity === "fve" && value < 0 ? " below" : "";
      element.className = `token level-${Math.round(share * (LEVELS - 1))}${below}`;
    });
  }

  // Makes a token the current one; it alone can be reached with Tab.
  select(text, token, focus = true) {
    if (this.current) {
      const before = this.element(...this.current);
      before.tabIndex = -1;
      before.setAttribute("aria-selected", "false");
    }
    this.current = [text, token];
    const element = this.element(text, token);
    element.tabIndex = 0;
    element.setAttribute("aria-selected", "true");
    this.choice.value = text;
    this.show(text, token);
    if (!focus) return;
    element.focus({preventScroll: true});
    this.reveal(element);
    const of = this.explorer.texts[text];
    this.said.textContent = `${of.explanations[token].join("")}; FVE ${number(of.fve[token])}`;
  }

  // Scrolls the texts, and not the page, until the token can be seen.
  reveal(element) {
    const box = element.getBoundingClientRect(), frame = this.flow.getBoundingClientRect(), margin = 2 * box.height;
    if (box.top < frame.top + margin) this.flow.scrollTop += box.top - frame.top - margin;
    else if (box.bottom > frame.bottom - margin) this.flow.scrollTop += box.bottom - frame.bottom + margin;
  }

  show(text, token) {
    if (this.shown?.[0] === text && this.shown[1] === token) return;
    this.shown = [text, token];
    const of = this.explorer.texts[text], words = this.explorer.words;
    const figures = Object.entries(QUANTITIES).map(([name, {label, unit, decimals}]) =>
      make("div", {}, make("dt", {}, label), make("dd", {}, `${number(of[name][token], decimals)}${unit}`)));
    this.panel.replaceChildren(
      make("h3", {}, make("span", {className: "faint"}, `token ${of.positions[token]} `), make("bdi", {className: "read"}, visibleToken(words[of.tokens[token]]))),
      make("p", {className: "label"}, "the lens's words for it"),
      explained(of.explanations[token], of.losses[token]),
      make("dl", {className: "numbers"}, ...figures),
      make("div", {className: "tops"},
        predictions("the original predicts", of.before[token], of.after[token], words),
        predictions("after the words alone", of.after[token], of.before[token], words)),
    );
  }
}

// A token where it stands in its text: a new line is shown, and made.
function visibleInFlow(piece) {
  const shown = visible(piece).replace(/⏎+$/, match => piece.endsWith("\n") ? `${match}\n` : match);
  return shown === "" ? "⟨empty⟩" : shown;
}

// The words of an explanation, each shaded by what the FVE loses without it.
function explained(words, losses) {
  const place = make("p", {className: "words", dir: "auto"});
  words.forEach((word, index) => {
    const loss = losses[index];
    const element = make("span", {className: "word"}, word.trim() ? visible(word.trim()) : visibleToken(word));
    if (loss !== undefined) {
      element.classList.add(`level-${Math.round(Math.min(1, Math.max(0, loss)) * (LEVELS - 1))}`);
      element.append(make("small", {title: "what the FVE loses without this word"}, number(-loss, 2).replace(/^([\d])/, "+$1")));
    }
    place.append(element, " ");
  });
  if (losses.length) place.append(make("span", {className: "faint note"}, "below each word: what FVE changes by without it"));
  return place;
}

function predictions(label, top, other, words) {
  const list = make("ol", {});
  for (let index = 0; index < top.length; index += 2) {
    const bar = make("span", {className: "part"});
    bar.style.width = `${100 * top[index + 1]}%`;
    const shared = other.some((place, at) => at % 2 === 0 && place === top[index]);
    list.append(make("li", {className: shared ? "shared" : ""}, bar, make("bdi", {}, visibleToken(words[top[index]])), make("span", {className: "share"}, percent(top[index + 1]))));
  }
  return make("div", {}, make("h4", {}, label), list);
}
