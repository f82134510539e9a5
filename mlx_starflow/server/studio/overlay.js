// A picture under a map of numbers, with a slider for the map's opacity and a scale.

import { el } from "./dom.js";
import { number } from "./words.js";

/**
 * Args: `image`, the URL of the picture; `maps`, by their names: {image, low, high, values, unit}, where `values` are
 * rows of numbers.
 */
export function createOverlay(image, maps) {
  const names = Object.keys(maps);
  const layer = el("img", { class: "map small", alt: "" });
  const picture = el("img", { class: "small", src: image, alt: "The picture as the model saw it" });
  const slider = el("input", { type: "range", min: 0, max: 100, value: 60, "aria-label": "Opacity of the map" });
  const choice = el("select", { "aria-label": "Map" }, names.map((name) => el("option", {}, name)));
  const scale = el("p", { class: "scale" });
  const reading = el("p", { class: "hint" }, "Point at a part to read its number.");
  const frame = el("div", { class: "overlay" }, picture, layer);

  function show() {
    const map = maps[choice.value];
    layer.src = map.image;
    scale.replaceChildren(el("span", {}, number(map.low)), el("span", { class: "colours" }), el("span", {}, `${number(map.high)} ${map.unit}`));
    fade();
  }

  function fade() {
    layer.style.opacity = slider.value / 100;
    slider.setAttribute("aria-valuetext", `${slider.value}%`);
  }

  frame.addEventListener("pointermove", (event) => {
    const box = frame.getBoundingClientRect();
    const { values, unit } = maps[choice.value];
    const at = (place, size, count) => Math.min(count - 1, Math.max(0, Math.floor((place / size) * count)));
    const row = values[at(event.clientY - box.top, box.height, values.length)];
    reading.textContent = `${number(row[at(event.clientX - box.left, box.width, row.length)])} ${unit}`;
  });
  slider.addEventListener("input", fade);
  choice.addEventListener("change", show);
  show();
  return el(
    "div",
    { class: "overlaid" },
    frame,
    scale,
    el("label", { class: "field" }, "Map over the picture", slider),
    names.length > 1 ? choice : null,
    reading,
  );
}
