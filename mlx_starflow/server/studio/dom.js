// The few things that every part of the page does with elements.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

/**
 * A new element. `attributes` are set as such, but for `class`, `on` (listeners by their events' names) and those
 * whose value is a boolean, which are properties. Texts among the children are texts, never HTML.
 */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else if (key === "class") {
      made.className = value;
    } else if (typeof value === "boolean") {
      made[key] = value;
    } else if (value !== null && value !== undefined) {
      made.setAttribute(key, value);
    }
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export function button(text, pressed, attributes = {}) {
  return el("button", { type: "button", on: { click: pressed }, ...attributes }, text);
}

/** A picture, enlarged without blur where it is small. */
export function img(url, alt, width) {
  return el("img", { src: url, alt, class: width && width < 160 ? "small" : "", loading: "lazy" });
}

/** Shows a sentence where something went wrong; without one, nothing is shown. */
export function say(place, sentence) {
  place.textContent = sentence ? sentence.charAt(0).toUpperCase() + sentence.slice(1) : "";
  place.hidden = !sentence;
}

/** Scrolls to where something happens, if that is out of sight, as it is below the form on a phone. */
export function reveal(place) {
  if (place.getBoundingClientRect().top > window.innerHeight * 0.8) place.scrollIntoView({ block: "start" });
}

/** Fills a dialog and opens it; it has a heading and a button that closes it. */
export function openDialog(dialog, title, ...children) {
  const close = button("Close", () => dialog.close(), { class: "quiet" });
  const heading = el("h2", { id: `${dialog.id}-title` }, title);
  dialog.replaceChildren(el("div", { class: "heading" }, heading, close), ...children);
  dialog.onclick = (event) => {
    if (event.target === dialog) dialog.close();
  };
  if (!dialog.open) dialog.showModal();
}
