// A path of pictures, one for each place on it, with a slider.

import { el, img } from "./dom.js";

/** Evenly spaced numbers from 0 to `most`. */
export function spaced(count, most = 1) {
  return Array.from({ length: count }, (_, at) => Math.round((1000 * most * at) / (count - 1)) / 1000);
}

/**
 * `places` are what the pictures are for, `what` is what they are called: "strength" or "share". A picture that is
 * not there yet is stood in for by the nearest one that is.
 */
export function createPath(what, places, actions) {
  const items = places.map(() => null);
  const large = el("div", { class: "growing" });
  const output = el("output");
  const slider = el("input", { type: "range", min: 0, max: places.length - 1, step: 1, value: 0, "aria-label": `Path: ${what}` });
  const row = el("div", { class: "steps" });
  const tools = el("div", { class: "row buttons" });
  const root = el("div", { class: "path" }, large, el("div", { class: "field" }, `${what} `, output, slider), row, tools);

  function nearest(at) {
    const there = items.map((item, index) => (item ? index : null)).filter((index) => index !== null);
    return there.sort((a, b) => Math.abs(a - at) - Math.abs(b - at))[0];
  }

  function show() {
    const at = Number(slider.value);
    const item = items[nearest(at)];
    output.value = `${places[at]}`;
    slider.setAttribute("aria-valuetext", `${what} ${places[at]}`);
    if (!item) return;
    large.replaceChildren(img(item.url, `${what} ${places[nearest(at)]}`, item.width));
    tools.replaceChildren(...actions(item));
  }

  function fill(picture) {
    items[picture.index] = picture;
    const go = (at) => () => {
      slider.value = at;
      show();
    };
    row.replaceChildren(
      ...items.flatMap((item, at) =>
        item
          ? [el("button", { type: "button", class: "bare", "aria-label": `${what} ${places[at]}`, on: { click: go(at) } },
              el("img", { src: item.url, alt: "" }))]
          : [],
      ),
    );
    show();
  }

  slider.addEventListener("input", show);
  show();
  return { root, fill };
}
