// The viewer: one picture, how it was made, and what can be done with it.

import { $, button, el, img, openDialog } from "./dom.js";
import { facts, shortened, titleOf } from "./words.js";

const actions = [];

/** Adds something that can be done with every picture: `act(item)`, after which the viewer closes. */
export function offer(text, act) {
  actions.push((item) => button(text, () => {
    $("#viewer").close();
    act(item);
  }));
}

/** Adds a control that is made for each picture by `make(item, close)`. */
export function offerControl(make) {
  actions.push((item) => make(item, () => $("#viewer").close()));
}

export function table(rows) {
  return el(
    "dl",
    { class: "facts" },
    Object.entries(rows).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
}

export function downloadLink(item) {
  return el("a", { class: "button", href: `${item.url}?download=true`, download: item.url.split("/").at(-1) }, "Download");
}

export function openPicture(item) {
  const title = titleOf(item);
  openDialog(
    $("#viewer"),
    shortened(title, 80),
    el(
      "div",
      { class: "viewed" },
      el("div", { class: "large" }, img(item.url, title, item.width)),
      el("div", {}, table(facts(item)), el("div", { class: "row buttons" }, actions.map((make) => make(item)), downloadLink(item))),
    ),
  );
}
