// Choosing a picture of the history.

import { quietly } from "./api.js";
import { $, button, el, img, openDialog } from "./dom.js";
import { history } from "./history.js";
import { shortened, titleOf } from "./words.js";

/** Lets one choose: the picture, or null if the dialog is closed. */
export function choose() {
  const dialog = $("#chooser");
  return new Promise((resolve) => {
    let chosen = null;
    const grid = el("ul", { class: "grid" });
    const older = button("Older ones", async () => {
      await quietly(history.older());
      fill();
    });

    function fill() {
      const images = history.items.filter((item) => item.kind === "image");
      grid.replaceChildren(...images.map(entry));
      older.hidden = !history.more;
    }

    function entry(item) {
      const title = titleOf(item);
      const take = () => {
        chosen = item;
        dialog.close();
      };
      return el(
        "li",
        { class: "card" },
        el("button", { type: "button", class: "bare", on: { click: take } }, img(item.url, title, item.width)),
        el("p", { class: "title" }, shortened(title, 40)),
      );
    }

    fill();
    const hint = history.items.length ? null : el("p", { class: "hint" }, "The history is empty.");
    dialog.addEventListener("close", () => resolve(chosen), { once: true });
    openDialog(dialog, "Choose a picture", grid, hint, older);
  });
}
