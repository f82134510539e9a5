// Quick previews: what a student makes of the prompt while it is typed, in one evaluation or a few. The next key ends
// the one before, and whoever asks for the exact picture gets it of the same noise.

import { post, quietly } from "./api.js";
import { $, el } from "./dom.js";
import { jobs } from "./jobs.js";
import { models } from "./models.js";
import { showQuick } from "./stage.js";

const PAUSE = 350; // ms without a key
const ABOUT = ["prompt", "label", "seed", "n", "size"]; // what a preview follows

const select = $("#quick");

/**
 * Previews in a stage. `asked` gives what the form asks for: `prompt`, `n`, `seed` and `size`, those that are given,
 * and throws where it is not to be sent.
 */
export function startQuick(form, stage, asked) {
  let timer = 0;
  let sent = null;
  let drawn = null;

  /** Shows the students of the chosen model. */
  function fit() {
    stop();
    const { kind, students } = models.chosen;
    const those = kind === "videos" ? [] : students;
    select.replaceChildren(
      ...those.map(({ id }) => el("option", { value: id }, `by ${id}`)),
      el("option", { value: "" }, "none"),
    );
    select.closest("label").hidden = !those.length;
  }

  /** No preview comes any more. */
  function stop() {
    clearTimeout(timer);
    sent?.abort();
    sent = null;
  }

  async function show() {
    const student = select.value;
    const others = jobs.list.some(({ kind, state }) => kind !== "preview" && ["running", "queued"].includes(state));
    if (others) return; // the stage is theirs
    const own = sent = new AbortController();
    await quietly(
      (async () => {
        const { prompt, n, seed, size } = asked();
        if (!prompt) return;
        const drew = drawn ?? Math.floor(Math.random() * 2 ** 31);
        const values = { prompt, n, size, seed: seed ?? drew, model: models.chosen.id, student, keep: false };
        const { result } = await post("/api/generate", values, own.signal);
        if (own.signal.aborted) return;
        if (seed === undefined) drawn = drew;
        showQuick(stage, result.pictures, student);
      })(),
    );
  }

  form.addEventListener("input", ({ target }) => {
    if (target !== select && !ABOUT.includes(target.name)) return;
    stop();
    if (select.value) timer = setTimeout(show, PAUSE);
  });

  return {
    fit,
    stop,
    /** The seed that was drawn for what is shown, once; undefined where none was. */
    takeSeed: () => {
      const seed = drawn ?? undefined;
      drawn = null;
      return seed;
    },
  };
}
