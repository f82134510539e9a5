// The stage: what is being made, growing block by block, until the finished pictures take its place.

import { $, el, img } from "./dom.js";
import { openPicture } from "./viewer.js";
import { number, progressWords, shortened } from "./words.js";

/**
 * A place for each of `count` pictures of a job, which are the best of so many samples; on the stage until the next
 * job takes it.
 *
 * Returns the job's watcher; `own` has methods that are called besides.
 */
export function startStage(stage, { count = 1, samples = 1, prompt = "" }, own = {}) {
  const places = Array.from({ length: count }, () => place());
  const words = el("p", { class: "hint" }, "Waits for its turn.");
  let board = null;

  function enter() {
    if (board) return;
    board = el("div", {}, el("div", { class: "places" }, places.map((each) => each.root)), words);
    stage.replaceChildren(board);
  }

  if (!stage.children.length) enter();
  return {
    state: ({ job }) => {
      if (job.state === "running") enter();
    },
    progress: (progress) => {
      enter();
      words.textContent = progressWords(progress);
    },
    preview: (preview) => {
      // Indices are those of the samples of a batch, and those of earlier batches are finished.
      const growing = places.filter((each) => !each.finished);
      if (preview.index % samples === 0) growing[preview.index / samples]?.grow(preview, previewWords(preview));
    },
    frame: (frame) => {
      places[0].grow(frame, `frame ${frame.index + 1} of ${frame.frames}`);
    },
    picture: (picture) => {
      enter();
      places[picture.index]?.finish(picture, prompt);
    },
    done: ({ result }) => {
      enter();
      const seconds = Object.values(result?.stats?.seconds ?? {}).reduce((sum, each) => sum + each, 0);
      words.textContent = seconds ? `Done in ${number(seconds)} s.` : "Done.";
    },
    failed: (data) => {
      leave();
      own.failed?.(data);
    },
    cancelled: () => {
      places.forEach((each) => each.stop());
      words.textContent = "Cancelled.";
    },
  };

  function leave() {
    if (!places.some((each) => each.finished)) board?.remove();
  }
}

/** Shows pictures that a student has made, which nobody keeps, on the stage until something is made. */
export function showQuick(stage, pictures, student) {
  const places = pictures.map(({ url, width, seed }) =>
    el(
      "figure",
      { class: "place quick" },
      el("div", { class: "growing" }, img(url, `preview, seed ${seed}`, width)),
      el("figcaption", {}, `seed ${seed}`),
    ),
  );
  const words = `A preview by ${student}: “Make” makes it exactly.`;
  stage.replaceChildren(
    el("div", {}, el("div", { class: "places" }, places), el("p", { class: "hint" }, words)),
  );
}

/** What a preview shows. */
function previewWords({ block, latent_frame: frame, latent_frames: frames }) {
  return frame === undefined ? `after block ${block}` : `preview of latent frame ${frame + 1} of ${frames}`;
}

/** Where one picture grows: the newest state large, the earlier ones in a row below. */
function place() {
  const large = el("div", { class: "growing" });
  const row = el("div", { class: "steps" });
  const root = el("figure", { class: "place" }, large, row);
  const self = { root, finished: false, grow, finish, stop };

  function grow({ image, width }, said) {
    large.replaceChildren(img(image, said, width ?? 0));
    if (row.children.length < 8) row.append(el("img", { src: image, alt: said, title: said }));
  }

  function finish(item, prompt) {
    self.finished = true;
    const said = `${shortened(prompt, 80)}, seed ${item.seed ?? "unknown"}`;
    const open = el("button", { type: "button", class: "bare", on: { click: () => openPicture(item) } });
    open.append(img(item.url, said, item.width));
    large.replaceChildren(open);
    root.classList.add("finished");
    if (row.children.length) row.append(el("img", { src: item.url, alt: "finished", title: "finished" }));
    if (!$("figcaption", root)) root.append(el("figcaption", {}, `seed ${item.seed ?? "–"}`));
  }

  function stop() {
    if (!self.finished) root.classList.add("stopped");
  }

  return self;
}
