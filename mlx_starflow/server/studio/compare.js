// Comparing: two pictures side by side, and what differs in how they were made.

import { $, button, el, img, openDialog } from "./dom.js";
import { facts, shortened, titleOf } from "./words.js";

const line = $("#comparing");

/** The pictures that are chosen, two at most: a third one takes the place of the first. */
class Choosing {
  #items = [];

  /** A box that chooses a picture. */
  box(item) {
    const input = el("input", { type: "checkbox", "data-compare": item.id, on: { change: () => this.#toggle(item) } });
    return el("label", { class: "check" }, input, "Compare");
  }

  forget(item) {
    this.#items = this.#items.filter((each) => each.id !== item.id);
    this.#show();
  }

  #toggle(item) {
    const chosen = this.#items.some((each) => each.id === item.id);
    this.#items = chosen ? this.#items.filter((each) => each.id !== item.id) : [...this.#items, item].slice(-2);
    this.#show();
  }

  #show() {
    const ids = this.#items.map((item) => item.id);
    for (const input of document.querySelectorAll("[data-compare]")) input.checked = ids.includes(input.dataset.compare);
    line.hidden = !ids.length;
    const both = ids.length === 2;
    const open = button(both ? "Compare both" : "Choose another one", () => compare(...this.#items));
    open.disabled = !both;
    const clear = button("Clear", () => {
      this.#items = [];
      this.#show();
    });
    line.replaceChildren(open, clear);
  }
}

export const choosing = new Choosing();

function compare(first, second) {
  const [one, other] = [facts(first), facts(second)];
  const names = [...new Set([...Object.keys(one), ...Object.keys(other)])];
  const picture = (item) => {
    const title = titleOf(item);
    return el("figure", {}, img(item.url, title, item.width), el("figcaption", {}, shortened(title, 60)));
  };
  const row = (name) =>
    el(
      "tr",
      { class: one[name] === other[name] ? "" : "differs" },
      el("th", { scope: "row" }, name),
      el("td", {}, one[name] ?? "–"),
      el("td", {}, other[name] ?? "–"),
    );
  openDialog(
    $("#comparison"),
    "Two pictures",
    el("div", { class: "pair" }, picture(first), picture(second)),
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, el("td", {}), el("th", { scope: "col" }, "left"), el("th", { scope: "col" }, "right"))),
      el("tbody", {}, names.map(row)),
    ),
  );
}
