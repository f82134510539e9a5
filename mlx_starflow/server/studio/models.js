// The models that the server has, and the one that is chosen.

import { get } from "./api.js";
import { $, el } from "./dom.js";

/** Tells "change" when another model is chosen. */
class Models extends EventTarget {
  all = [];
  limits = {};
  upscale = []; // how often what is made can be enlarged
  #select = $("#model");

  /** Asks the server. Throws Refused, with status 401 if it wants a key. */
  async start() {
    const [{ limits, upscale }, { models, default: first }] = await Promise.all([get("/api/server"), get("/api/models")]);
    [this.all, this.limits, this.upscale] = [models, limits, upscale];
    this.#select.replaceChildren(...models.map((model) => el("option", { value: model.id }, model.id)));
    this.#select.value = first;
    this.#select.onchange = () => this.dispatchEvent(new Event("change"));
    this.dispatchEvent(new Event("change"));
  }

  get chosen() {
    return this.all.find((model) => model.id === this.#select.value);
  }

  /** Chooses a model if the server has it. */
  choose(id) {
    if (id === this.#select.value || !this.all.some((model) => model.id === id)) return;
    this.#select.value = id;
    this.dispatchEvent(new Event("change"));
  }
}

export const models = new Models();
