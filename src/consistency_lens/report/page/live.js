"use strict";
// A place to type a text, which the server behind the page reads.

function live() {
  const section = document.getElementById("explorer"), place = section.querySelector('[data-part="explorer"]');
  const text = make("textarea", {id: "text", rows: "2", required: true, spellcheck: "false", placeholder: "Once upon a time there was a little dog"});
  const button = make("button", {type: "submit"}, "Explain"), said = make("p", {className: "faint", role: "status"});
  const form = make("form", {className: "ask"},
    make("label", {for: "text"}, `A text of up to ${report.live.max_tokens} tokens`), text, button, said);
  form.onsubmit = async event => {
    event.preventDefault();
    button.disabled = true;
    said.textContent = "reading …";
    try {
      const answer = await fetch("api/explain", {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify({text: text.value})});
      const content = await answer.json();
      if (!answer.ok) throw new Error(content.error);
      new Explorer(place, content);
      said.textContent = `read ${content.texts[0].tokens.length} tokens`;
    } catch (error) {
      said.textContent = visible(error.message);
    } finally {
      button.disabled = false;
    }
  };
  text.onkeydown = event => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      form.requestSubmit();
    }
  };
  place.before(form);
  if (section.hidden) document.querySelector("nav").prepend(make("a", {href: "#explorer"}, "Explorer"));
  section.hidden = false;
  document.querySelector("main").prepend(section);
  text.focus({preventScroll: true});
}

live();
