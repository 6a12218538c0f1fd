"use strict";
// Elements, text and numbers. Text of models and data goes in as text nodes, never as HTML.

const LONGEST = 400;  // characters of a token or an explanation that are shown
// Control characters, marks that change the direction of text, halves of a pair and the like show nothing of their own.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cn}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu;
const NAMED = {"\n": "⏎", "\r": "␍", "\t": "⇥"};

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "className" || name.startsWith("on")) element[name] = value;
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function clipped(text, longest = LONGEST) {
  return text.length > longest ? text.slice(0, longest) + "…" : text;
}

// A text whose every character can be seen; spaces stay.
function visible(text) {
  return clipped(text).replace(UNSEEN, character =>
    NAMED[character] ?? `⟨U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// A single token: what is nothing but white space has a sign too.
function visibleToken(text) {
  if (text === "") return "⟨empty⟩";
  return text.trim() === "" ? visible(text).replaceAll(" ", "␣") : visible(text);
}

// Text of a model or of data, whose direction does not reach beyond it.
function foreign(text, className = "") {
  return make("bdi", {className, dir: "auto"}, visible(text));
}

function number(value, decimals = 2) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value.toFixed(decimals).replace("-", "−");
}

function percent(share) {
  return `${(100 * share).toFixed(0).replace("-", "−")}%`;
}

function span(interval, decimals) {
  return interval ? `${number(interval[0], decimals)} to ${number(interval[1], decimals)}` : "";
}

// A table whose first column is text and whose others are numbers.
function table(columns, rows, caption = "") {
  const head = make("tr", {}, ...columns.map(name => make("th", {scope: "col"}, name)));
  const body = rows.map(([first, ...rest]) =>
    make("tr", {}, make("th", {scope: "row"}, first), ...rest.map(cell => make("td", {}, cell))));
  return make("div", {className: "scroll", tabindex: "0", role: "group", "aria-label": caption || columns.join(", ")},
    make("table", {}, ...(caption ? [make("caption", {}, caption)] : []), make("thead", {}, head), make("tbody", {}, ...body)));
}
